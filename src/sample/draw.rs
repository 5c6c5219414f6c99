//! Takes pictures of solids: ray marching over signed distances, as in J. C. Hart, "Sphere tracing",
//! The Visual Computer 12 (1996), with the primitives and unions of I. Quilez,
//! <https://iquilezles.org/articles/distfunctions/>.
//!
//! All of it is `+ - * /`, `sqrt` and comparisons in f32, and hashes of integers. IEEE 754 defines
//! these to the last bit, which it does not for sines and powers, so a picture is the same on every
//! machine. For the same reason the random numbers are our own: a generator that its crate may change
//! with the next version would change the data set.

use std::ops::{Add, Mul, Neg, Sub};

/// Width and height of a picture in pixels.
pub(super) const SIZE: usize = 100;

/// Width and height of the squares of pixels whose rays start together. Divides [`SIZE`].
const BLOCK: usize = 4;

/// SplitMix64: G. L. Steele, D. Lea, C. H. Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Random {
    /// The stream of random numbers that `keys` name: another key, an unrelated stream.
    pub(super) fn new(keys: &[u64]) -> Self {
        Self(keys.iter().fold(0, |state, key| Self(state ^ key).next()))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in `low..high`.
    pub(super) fn within(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * ((self.next() >> 40) as f32 / (1_u32 << 24) as f32)
    }

    /// True in `share` of all cases.
    pub(super) fn chance(&mut self, share: f32) -> bool {
        self.within(0.0, 1.0) < share
    }

    /// A vector with each component in `-extent..extent`.
    pub(super) fn vector(&mut self, extent: f32) -> Vec3 {
        let mut next = || self.within(-extent, extent);
        Vec3::new(next(), next(), next())
    }

    /// An angle between two, each given as the tangent of its half: 1 is a quarter turn.
    pub(super) fn angle(&mut self, low: f32, high: f32) -> Angle {
        let t = self.within(low, high);
        Angle {
            cos: (1.0 - t * t) / (1.0 + t * t),
            sin: 2.0 * t / (1.0 + t * t),
        }
    }

    /// Any angle.
    pub(super) fn turn(&mut self) -> Angle {
        let angle = self.angle(-1.0, 1.0);
        if self.chance(0.5) { angle } else { angle.opposite() }
    }
}

/// An angle, as a rotation needs it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Angle {
    pub(super) cos: f32,
    pub(super) sin: f32,
}

impl Angle {
    /// Half a turn further.
    pub(super) fn opposite(self) -> Self {
        Self {
            cos: -self.cos,
            sin: -self.sin,
        }
    }

    /// Turns the point (`x`, `y`) around the origin.
    pub(super) fn rotate(self, x: f32, y: f32) -> (f32, f32) {
        (self.cos * x - self.sin * y, self.sin * x + self.cos * y)
    }

    /// The sum of two angles.
    pub(super) fn plus(self, other: Self) -> Self {
        let (cos, sin) = self.rotate(other.cos, other.sin);
        Self { cos, sin }
    }
}

/// A point, a direction or a colour (linear red, green, blue from 0 to 1).
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Vec3 {
    pub(super) x: f32,
    pub(super) y: f32,
    pub(super) z: f32,
}

impl Vec3 {
    pub(super) const fn new(x: f32, y: f32, z: f32) -> Self {
        Self { x, y, z }
    }

    /// One in every component: white.
    const ONE: Self = Self::new(1.0, 1.0, 1.0);

    pub(super) fn dot(self, other: Self) -> f32 {
        self.x * other.x + self.y * other.y + self.z * other.z
    }

    pub(super) fn length(self) -> f32 {
        self.dot(self).sqrt()
    }

    pub(super) fn cross(self, other: Self) -> Self {
        Self::new(
            self.y * other.z - self.z * other.y,
            self.z * other.x - self.x * other.z,
            self.x * other.y - self.y * other.x,
        )
    }

    /// The direction of a vector; zero has none and stays zero.
    pub(super) fn unit(self) -> Self {
        self * (1.0 / self.length().max(f32::MIN_POSITIVE))
    }

    /// Component by component.
    pub(super) fn times(self, other: Self) -> Self {
        Self::new(self.x * other.x, self.y * other.y, self.z * other.z)
    }

    /// From `self` where `share` is 0 to `other` where it is 1.
    pub(super) fn mix(self, other: Self, share: f32) -> Self {
        self + (other - self) * share.clamp(0.0, 1.0)
    }
}

impl Add for Vec3 {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self::new(self.x + other.x, self.y + other.y, self.z + other.z)
    }
}

impl Sub for Vec3 {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self::new(self.x - other.x, self.y - other.y, self.z - other.z)
    }
}

impl Neg for Vec3 {
    type Output = Self;
    fn neg(self) -> Self {
        self * -1.0
    }
}

impl Mul<f32> for Vec3 {
    type Output = Self;
    fn mul(self, factor: f32) -> Self {
        Self::new(self.x * factor, self.y * factor, self.z * factor)
    }
}

/// A colour as it is written for a screen. The square stands for the gamma of 2.2.
pub(super) const fn rgb(red: u8, green: u8, blue: u8) -> Vec3 {
    const fn linear(level: u8) -> f32 {
        let level = level as f32 / 255.0;
        level * level
    }
    Vec3::new(linear(red), linear(green), linear(blue))
}

/// 0 below `low`, 1 above `high`, smooth between.
pub(super) fn smoothstep(low: f32, high: f32, x: f32) -> f32 {
    let t = ((x - low) / (high - low)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// The union of two solids, with the edge between them rounded over about `width`.
pub(super) fn smooth_min(a: f32, b: f32, width: f32) -> f32 {
    let h = (1.0 - (a - b).abs() / width).max(0.0);
    a.min(b) - h * h * width * 0.25
}

/// The distance to an ellipsoid of these half axes; near the surface, and a bound elsewhere.
pub(super) fn ellipsoid(p: Vec3, axes: Vec3) -> f32 {
    let inverse = Vec3::new(1.0 / axes.x, 1.0 / axes.y, 1.0 / axes.z);
    let q = p.times(inverse);
    let k = q.length();
    k * (k - 1.0) / q.times(inverse).length().max(f32::MIN_POSITIVE)
}

/// The distance to the segment from `a` to `b`, and how far along it the nearest point is, 0 to 1.
pub(super) fn segment(p: Vec3, a: Vec3, b: Vec3) -> (f32, f32) {
    let (ap, ab) = (p - a, b - a);
    let along = (ap.dot(ab) / ab.dot(ab)).clamp(0.0, 1.0);
    ((ap - ab * along).length(), along)
}

/// Value noise, -1 to 1, from one random level per point of the integer grid, and its gradient.
fn noise_with_gradient(p: Vec3) -> (f32, Vec3) {
    fn level(x: i32, y: i32, z: i32) -> f32 {
        let n = (x as u32).wrapping_mul(0x8DA6_B343) ^ (y as u32).wrapping_mul(0xD816_3841);
        let n = n ^ (z as u32).wrapping_mul(0xCB1A_B31F);
        let n = (n ^ (n >> 15)).wrapping_mul(0x2C1B_3C6D);
        (n >> 8) as f32 / (1_u32 << 23) as f32 - 1.0
    }
    /// The cell of a coordinate, how far it is into it, smoothed, and the slope of that.
    fn cell(x: f32) -> (i32, f32, f32) {
        let floor = x as i32 - i32::from(x < 0.0);
        let t = x - floor as f32;
        (floor, t * t * (3.0 - 2.0 * t), 6.0 * t * (1.0 - t))
    }
    // The points of a solid times a frequency stay far from the limits of i32.
    let ((x, u, du), (y, v, dv), (z, w, dw)) = (cell(p.x), cell(p.y), cell(p.z));
    // Value and slope along x at the four edges, then along y, then along z.
    let edge = |y, z| {
        let (a, b) = (level(x, y, z), level(x + 1, y, z));
        (a + (b - a) * u, b - a)
    };
    let plane = |z| {
        let (a, b) = (edge(y, z), edge(y + 1, z));
        (a.0 + (b.0 - a.0) * v, a.1 + (b.1 - a.1) * v, b.0 - a.0)
    };
    let (a, b) = (plane(z), plane(z + 1));
    let slope = Vec3::new(
        (a.1 + (b.1 - a.1) * w) * du,
        (a.2 + (b.2 - a.2) * w) * dv,
        (b.0 - a.0) * dw,
    );
    (a.0 + (b.0 - a.0) * w, slope)
}

/// Value noise, -1 to 1.
pub(super) fn noise(p: Vec3) -> f32 {
    noise_with_gradient(p).0
}

/// How a rough surface tilts: the gradient of [`noise`].
pub(super) fn roughness(p: Vec3) -> Vec3 {
    noise_with_gradient(p).1
}

/// Two octaves of [`noise`].
pub(super) fn clouds(p: Vec3) -> f32 {
    noise(p) * 0.64 + noise(p * 2.1) * 0.36
}

/// What a point of a surface looks like.
pub(super) struct Skin {
    pub(super) color: Vec3,
    /// The strength of the highlight, 0 to 1.
    pub(super) gloss: f32,
    /// Added to the normal.
    pub(super) bump: Vec3,
}

/// A solid inside the unit ball, in coordinates of its own.
pub(super) trait Solid {
    /// How far `p` is outside the surface (negative: inside), or less.
    fn distance(&self, p: Vec3) -> f32;

    /// What the surface looks like at its point `p`.
    fn skin(&self, p: Vec3) -> Skin;
}

/// A rotation: the solid's axes as the camera sees them, x to the right, y up, z to the viewer.
#[derive(Debug)]
pub(super) struct Pose([Vec3; 3]);

impl Pose {
    /// Spins a solid around its own y axis, then nods its top to the viewer, then rolls it in the picture.
    pub(super) fn new(spin: Angle, nod: Angle, roll: Angle) -> Self {
        let axes = [
            Vec3::new(1.0, 0.0, 0.0),
            Vec3::new(0.0, 1.0, 0.0),
            Vec3::new(0.0, 0.0, 1.0),
        ];
        Self(axes.map(|axis| {
            let (z, x) = spin.rotate(axis.z, axis.x);
            let (y, z) = nod.rotate(axis.y, z);
            let (x, y) = roll.rotate(x, y);
            Vec3::new(x, y, z)
        }))
    }

    /// From the camera's coordinates to the solid's.
    fn unpose(&self, v: Vec3) -> Vec3 {
        let [x, y, z] = self.0;
        Vec3::new(x.dot(v), y.dot(v), z.dot(v))
    }
}

/// The light of a picture, in the solid's coordinates.
struct Light {
    /// Where the lamp is.
    toward: Vec3,
    /// Between the lamp and the viewer: a surface that faces it shines.
    halfway: Vec3,
    up: Vec3,
    ray: Vec3,
    lamp: Vec3,
    ambient: f32,
}

impl Light {
    fn new(random: &mut Random, pose: &Pose) -> Self {
        let ray = pose.unpose(Vec3::new(0.0, 0.0, -1.0));
        let toward = Vec3::new(
            random.within(-0.8, 0.8),
            random.within(0.1, 0.9),
            random.within(0.6, 1.0),
        );
        let toward = pose.unpose(toward.unit());
        let warmth = random.within(-0.06, 0.06);
        Self {
            toward,
            halfway: (toward - ray).unit(),
            up: pose.unpose(Vec3::new(0.0, 1.0, 0.0)),
            ray,
            lamp: Vec3::new(1.0 + warmth, 1.0, 1.0 - warmth) * random.within(0.85, 1.2),
            ambient: random.within(0.25, 0.4),
        }
    }

    /// The colour in which the viewer sees the point `p` of the surface (J. F. Blinn's model, 1977).
    fn shade(&self, solid: &impl Solid, p: Vec3) -> Vec3 {
        // The gradient of the distance, from the corners of a tetrahedron.
        let corners = [(1.0, -1.0, -1.0), (-1.0, -1.0, 1.0), (-1.0, 1.0, -1.0), (1.0, 1.0, 1.0)];
        let normal = corners.iter().fold(Vec3::default(), |sum, &(x, y, z)| {
            let corner = Vec3::new(x, y, z);
            sum + corner * solid.distance(p + corner * 0.008)
        });
        let normal = normal.unit();
        // Where other parts are close, less light arrives.
        let open = 0.3 + 0.7 * (solid.distance(p + normal * 0.16) / 0.16).clamp(0.0, 1.0);
        let skin = solid.skin(p);
        let normal = (normal + skin.bump).unit();
        let facing = (-normal.dot(self.ray)).clamp(0.0, 1.0);
        let diffuse = ((normal.dot(self.toward) + 0.15) / 1.15).max(0.0);
        let ambient = self.ambient * (0.8 + 0.2 * normal.dot(self.up)) * (0.6 + 0.4 * facing);
        let square = |x: f32| x * x;
        let broad = square(square(square(normal.dot(self.halfway).max(0.0))));
        let highlight = skin.gloss * (0.12 * broad + 0.8 * square(square(broad)));
        (skin.color * (diffuse + ambient) + Vec3::ONE * highlight).times(self.lamp) * open
    }
}

/// How far a ray went, and where on its way it was nearest to the surface.
struct Trace {
    gone: f32,
    nearest: f32,
    at: f32,
}

/// Follows a ray that is 2 `width` wide from `start + ray * gone` to the surface, or past the solid.
fn march(solid: &impl Solid, start: Vec3, ray: Vec3, gone: f32, width: f32) -> Trace {
    let mut trace = Trace {
        gone,
        nearest: f32::MAX,
        at: gone,
    };
    for _ in 0..40 {
        let distance = solid.distance(start + ray * trace.gone);
        if distance < trace.nearest {
            (trace.nearest, trace.at) = (distance, trace.gone);
        }
        if distance < width * 1.2 + 0.007 || trace.gone > 2.0 {
            break;
        }
        trace.gone += distance - width;
    }
    trace
}

/// Takes a picture of `solid` on white: [`SIZE`] x [`SIZE`] pixels, RGB, row by row. The place, the
/// size and the light are random.
pub(super) fn render(solid: &impl Solid, pose: &Pose, random: &mut Random) -> Vec<u8> {
    // The unit ball around the solid fills this share of the picture, somewhere in it.
    let share = random.within(0.8, 0.98);
    let room = (1.0 - share) * 0.9;
    let (right, up) = (random.within(-room, room), random.within(-room, room));
    let light = Light::new(random, pose);
    let pixel = 2.0 / (SIZE as f32 * share);
    // Where the ray of a point of the picture starts, in the solid's coordinates.
    let start = |column: f32, row: f32| {
        let x = (column * 2.0 / SIZE as f32 - 1.0 - right) / share;
        let y = (1.0 - row * 2.0 / SIZE as f32 - up) / share;
        pose.unpose(Vec3::new(x, y, 1.0))
    };

    let mut pixels = vec![u8::MAX; SIZE * SIZE * 3];
    for block in 0..(SIZE / BLOCK) * (SIZE / BLOCK) {
        let (column, row) = (block % (SIZE / BLOCK) * BLOCK, block / (SIZE / BLOCK) * BLOCK);
        // The rays of a block go together to where the first of them might hit.
        let half = BLOCK as f32 / 2.0;
        let width = half * 1.5 * pixel;
        let together = march(
            solid,
            start(column as f32 + half, row as f32 + half),
            light.ray,
            0.0,
            width,
        );
        if together.nearest > width * 1.2 + 2.0 * pixel {
            continue;
        }
        for (column, row) in (0..BLOCK * BLOCK).map(|i| (column + i % BLOCK, row + i / BLOCK)) {
            let start = start(column as f32 + 0.5, row as f32 + 0.5);
            let trace = march(solid, start, light.ray, together.gone, 0.0);
            // A ray that misses by less than a pixel is covered in part: smooth outlines.
            let cover = 1.35 - trace.nearest / pixel;
            if cover > 0.0 {
                let color = Vec3::ONE.mix(light.shade(solid, start + light.ray * trace.at), cover);
                // The camera's own noise.
                let grain = random.within(-0.008, 0.008);
                let levels = [color.x, color.y, color.z].map(|c| ((c.sqrt() + grain) * 255.0 + 0.5) as u8);
                pixels[(row * SIZE + column) * 3..][..3].copy_from_slice(&levels);
            }
        }
    }
    pixels
}

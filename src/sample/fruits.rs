//! The fruits of the sample: how each kind grows, its shape and its skin.

use super::draw::{
    Angle, Pose, Random, Skin, Solid, Vec3, clouds, ellipsoid, noise, render, rgb, roughness, segment, smooth_min,
    smoothstep,
};

/// A kind of fruit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fruit {
    Apple,
    Banana,
    Blueberry,
    Kiwi,
    Lemon,
    Orange,
    Plum,
    Strawberry,
}

impl Fruit {
    pub(super) const ALL: [Self; 8] = [
        Self::Apple,
        Self::Banana,
        Self::Blueberry,
        Self::Kiwi,
        Self::Lemon,
        Self::Orange,
        Self::Plum,
        Self::Strawberry,
    ];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Apple => "Apple",
            Self::Banana => "Banana",
            Self::Blueberry => "Blueberry",
            Self::Kiwi => "Kiwi",
            Self::Lemon => "Lemon",
            Self::Orange => "Orange",
            Self::Plum => "Plum",
            Self::Strawberry => "Strawberry",
        }
    }

    /// Takes a picture of a fruit of this kind: [`SIZE`](super::draw::SIZE) squared pixels, RGB. The
    /// same `random` gives the same picture.
    pub(super) fn draw(self, mut random: Random) -> Vec<u8> {
        let r = &mut random;
        match self {
            Self::Apple => {
                let pose = Pose::new(r.turn(), r.angle(-0.1, 0.6), r.angle(-0.3, 0.3));
                render(&Apple::grow(r), &pose, r)
            }
            Self::Banana => {
                // The plane that it lies in faces the viewer, with one side or the other.
                let spin = r.angle(-0.35, 0.35);
                let spin = if r.chance(0.5) { spin } else { spin.opposite() };
                let pose = Pose::new(spin, r.angle(-0.3, 0.3), r.turn());
                render(&Banana::grow(r), &pose, r)
            }
            Self::Blueberry => {
                let pose = Pose::new(r.turn(), r.angle(0.05, 0.65), r.turn());
                render(&Blueberries::grow(r), &pose, r)
            }
            Self::Kiwi => {
                let kiwi = Kiwi::grow(r);
                // A half shows its face.
                let nod = if kiwi.cut {
                    r.angle(0.55, 0.95)
                } else {
                    r.angle(-0.6, 0.6)
                };
                let pose = Pose::new(r.turn(), nod, r.turn());
                render(&kiwi, &pose, r)
            }
            Self::Lemon => {
                let pose = Pose::new(r.turn(), r.angle(-0.35, 0.35), r.turn());
                render(&Lemon::grow(r), &pose, r)
            }
            Self::Orange => {
                let pose = Pose::new(r.turn(), r.angle(-0.4, 0.8), r.turn());
                render(&Orange::grow(r), &pose, r)
            }
            Self::Plum => {
                let pose = Pose::new(r.turn(), r.angle(-0.25, 0.55), r.angle(-0.5, 0.5));
                render(&Plum::grow(r), &pose, r)
            }
            Self::Strawberry => {
                let pose = Pose::new(r.turn(), r.angle(-0.25, 0.45), r.angle(-0.45, 0.45));
                render(&Strawberry::grow(r), &pose, r)
            }
        }
    }
}

/// The points of a five-pointed star: 0, 72, 144, 216 and 288 degrees.
const STAR: [Angle; 5] = [
    Angle { cos: 1.0, sin: 0.0 },
    Angle {
        cos: 0.309_017,
        sin: 0.951_056_5,
    },
    Angle {
        cos: -0.809_017,
        sin: 0.587_785_25,
    },
    Angle {
        cos: -0.809_017,
        sin: -0.587_785_25,
    },
    Angle {
        cos: 0.309_017,
        sin: -0.951_056_5,
    },
];

/// Half a turn.
const HALF: Angle = Angle { cos: -1.0, sin: 0.0 };
/// A third of a turn.
const THIRD: Angle = Angle {
    cos: -0.5,
    sin: 0.866_025_4,
};
/// 5/22 of a turn: from seed to seed of a kiwi, in 22 rows.
const KIWI: Angle = Angle {
    cos: 0.142_314_84,
    sin: 0.989_821_4,
};
/// The golden angle: from seed to seed of a strawberry.
const GOLDEN: Angle = Angle {
    cos: -0.737_368_9,
    sin: 0.675_490_3,
};

/// How close the direction of (`x`, `y`) comes to a point of the [`STAR`]: the cosine between, 0.81 to 1.
fn star(x: f32, y: f32) -> f32 {
    let length = (x * x + y * y).sqrt().max(1e-6);
    STAR.iter().fold(0.0, |best: f32, point| {
        best.max((x * point.cos + y * point.sin) / length)
    })
}

/// The distance from the y axis.
fn off_axis(p: Vec3) -> f32 {
    (p.x * p.x + p.z * p.z).sqrt()
}

/// The direction of `p` around the y axis.
fn around(p: Vec3) -> Vec3 {
    Vec3::new(p.x, 0.0, p.z) * (1.0 / off_axis(p).max(1e-6))
}

/// A woody stem: its lower end, its upper end, its thickness.
struct Stem(Vec3, Vec3, f32);

impl Stem {
    fn distance(&self, p: Vec3) -> f32 {
        let (distance, along) = segment(p, self.0, self.1);
        distance - self.2 * (0.8 + 0.5 * along * along)
    }

    fn skin(p: Vec3) -> Skin {
        Skin {
            color: rgb(104, 78, 44) * (1.0 + 0.3 * noise(p * 30.0)),
            gloss: 0.05,
            bump: Vec3::default(),
        }
    }
}

/// A spindle torus: a circle around an axis that it crosses, so that there is a hollow at either pole.
struct Apple {
    /// How far the circle's centre is from the axis.
    ring: f32,
    radius: f32,
    taper: f32,
    stem: Option<Stem>,
    ground: Vec3,
    blush: Vec3,
    /// The side that was in the sun.
    sun: Vec3,
    redness: f32,
    grain: Vec3,
}

impl Apple {
    fn grow(r: &mut Random) -> Self {
        let ring = r.within(0.2, 0.28);
        let grounds = [rgb(150, 178, 52), rgb(196, 194, 66), rgb(222, 190, 80)];
        let lean = r.vector(0.14);
        Self {
            ring,
            radius: 0.9 - ring,
            taper: r.within(0.08, 0.2),
            stem: r.chance(0.85).then(|| {
                Stem(
                    Vec3::new(0.0, 0.3, 0.0),
                    Vec3::new(lean.x, r.within(0.82, 1.0), lean.z),
                    r.within(0.025, 0.04),
                )
            }),
            ground: grounds[0]
                .mix(grounds[1], r.within(0.0, 1.6))
                .mix(grounds[2], r.within(-0.4, 0.8)),
            blush: rgb(188, 26, 30).mix(rgb(128, 10, 28), r.within(0.0, 1.0)),
            sun: (r.vector(1.0) + Vec3::new(0.0, 0.3, 0.0)).unit(),
            redness: r.within(-0.75, 1.3),
            grain: r.vector(50.0),
        }
    }

    fn flesh(&self, p: Vec3) -> f32 {
        // Narrower below.
        let wide = 1.0 + self.taper * (p.y - 0.3);
        let off = off_axis(p) / wide - self.ring;
        ((off * off + p.y * p.y * 0.86).sqrt() - self.radius) * 0.92
    }
}

impl Solid for Apple {
    fn distance(&self, p: Vec3) -> f32 {
        let flesh = self.flesh(p);
        self.stem.as_ref().map_or(flesh, |stem| flesh.min(stem.distance(p)))
    }

    fn skin(&self, p: Vec3) -> Skin {
        if self.stem.as_ref().is_some_and(|stem| stem.distance(p) < self.flesh(p)) {
            return Stem::skin(p);
        }
        // Red where the sun was, in streaks from pole to pole.
        let streaks = noise(around(p) * 9.0 + Vec3::new(0.0, p.y * 1.5, 0.0) + self.grain);
        let red = self.redness + 0.9 * p.dot(self.sun) + 0.35 * streaks + 0.35 * clouds(p * 2.5 + self.grain);
        let color = self.ground.mix(self.blush, smoothstep(-0.3, 0.8, red));
        let dots = smoothstep(0.62, 0.8, noise(p * 17.0 + self.grain));
        let hollow = smoothstep(0.3, 0.08, off_axis(p));
        let russet = if p.y > 0.0 { rgb(138, 128, 52) } else { rgb(92, 70, 40) };
        Skin {
            color: color.mix(rgb(226, 206, 140), 0.35 * dots).mix(russet, hollow * 0.8),
            gloss: 0.45,
            bump: roughness(p * 6.0 + self.grain) * 0.03,
        }
    }
}

/// A tube of five sides along an arc in the plane of x and y, thinner at its ends, with a stem at one.
struct Banana {
    /// Half the arc.
    end: Angle,
    /// The arc's radius.
    arc: f32,
    thick: f32,
    /// 0 is green, 1 has freckles.
    ripeness: f32,
    /// How much the five sides show.
    facet: f32,
    grain: Vec3,
}

impl Banana {
    fn grow(r: &mut Random) -> Self {
        let end = r.angle(0.42, 0.56);
        Self {
            end,
            arc: 0.82 / end.sin,
            thick: r.within(0.19, 0.25),
            ripeness: r.within(0.0, 1.0),
            facet: r.within(0.5, 1.0),
            grain: r.vector(50.0),
        }
    }

    /// `p` as seen from the middle of the arc's circle.
    fn centered(&self, p: Vec3) -> Vec3 {
        Vec3::new(p.x, p.y - self.arc * (0.5 + 0.5 * self.end.cos), p.z)
    }

    /// Along the arc, from -1 at the blossom to 1 at the stem.
    fn along(&self, p: Vec3) -> f32 {
        let c = self.centered(p);
        let length = (c.x * c.x + c.y * c.y).sqrt().max(1e-6);
        c.x / length / self.end.sin
    }
}

impl Solid for Banana {
    fn distance(&self, p: Vec3) -> f32 {
        let c = self.centered(p);
        let length = (c.x * c.x + c.y * c.y).sqrt();
        let Angle { cos, sin } = self.end;
        // Inside the arc's sector the nearest point of the arc is straight ahead, else it is an end.
        let inside = -c.y * sin > c.x.abs() * cos;
        let (radial, beyond) = if inside {
            (length - self.arc, 0.0)
        } else {
            let (x, y) = (c.x.abs() - self.arc * sin, c.y + self.arc * cos);
            // Across and along the tube at its end.
            (x * sin - y * cos, x * cos + y * sin)
        };
        let along = self.along(p).clamp(-1.0, 1.0);
        let a4 = along * along * along * along;
        let girth = self.thick * (1.0 - 0.62 * a4 * along.abs());
        // Five sides.
        let round = star(radial, p.z);
        let girth = girth * (1.0 + self.facet * 0.55 * (0.9 - round) * (1.0 - a4));
        let tube = (radial * radial + p.z * p.z + beyond * beyond).sqrt() - girth;
        let end = Vec3::new(self.arc * sin, -self.arc * cos, 0.0);
        let stem = segment(c, end, end + Vec3::new(cos, sin, 0.0) * 0.16).0 - 0.06;
        smooth_min(tube, stem, 0.12) * 0.85
    }

    fn skin(&self, p: Vec3) -> Skin {
        let along = self.along(p);
        let mottle = clouds(p * 3.0 + self.grain);
        let yellow = rgb(240, 200, 50).mix(rgb(222, 168, 40), self.ripeness);
        let green = rgb(150, 176, 54);
        let greenness = smoothstep(0.55, 0.0, self.ripeness) * 0.75 + smoothstep(0.6, 1.15, along) * 0.6;
        let color = yellow.mix(green, greenness + 0.15 * mottle);
        // Ripe bananas have freckles.
        let freckles = smoothstep(
            0.95 - 0.5 * self.ripeness,
            1.05 - 0.5 * self.ripeness,
            noise(p * 13.0 + self.grain),
        );
        let stretched = Vec3::new(p.x * 3.0, p.y * 3.0, p.z * 24.0) + self.grain;
        let scars = smoothstep(0.5, 0.9, noise(stretched)) * self.ripeness;
        let ends = smoothstep(-0.99, -1.06, along) + smoothstep(1.22, 1.3, along);
        Skin {
            color: color
                .mix(rgb(96, 58, 22), 0.8 * freckles + 0.4 * scars)
                .mix(rgb(62, 46, 28), ends),
            gloss: 0.16,
            bump: roughness(p * 9.0 + self.grain) * 0.04,
        }
    }
}

/// One to three berries, each with the crown of its blossom.
struct Blueberries {
    berries: Vec<Berry>,
    bloom: f32,
    grain: Vec3,
}

struct Berry {
    center: Vec3,
    radius: f32,
    /// Its axes; the crown is at the top of the second.
    axes: [Vec3; 3],
}

impl Berry {
    /// In the berry's coordinates, its radius being 1.
    fn local(&self, p: Vec3) -> Vec3 {
        let q = (p - self.center) * (1.0 / self.radius);
        let [x, y, z] = self.axes;
        Vec3::new(x.dot(q), y.dot(q), z.dot(q))
    }

    fn distance(&self, p: Vec3) -> f32 {
        let ball = (p - self.center).length() - self.radius * 1.1;
        if ball > 0.15 {
            return ball;
        }
        let q = self.local(p);
        let body = ellipsoid(q, Vec3::new(1.0, 0.88, 1.0));
        if q.y < 0.4 {
            return body * self.radius;
        }
        let off = off_axis(q);
        // A wall of five lobes around a hollow.
        let lobes = 0.1 * smoothstep(0.84, 1.0, star(q.x, q.z));
        let (across, above) = (off - 0.31 - 0.4 * lobes, (q.y - 0.85 - lobes).max(0.0));
        let rim = (across * across + above * above).sqrt() - 0.04;
        let hollow = 0.3 - (off * off + (q.y - 1.0) * (q.y - 1.0)).sqrt();
        smooth_min(body.max(hollow), rim, 0.06) * self.radius * 0.85
    }
}

impl Blueberries {
    fn grow(r: &mut Random) -> Self {
        let (count, apart, size) = match r.within(0.0, 5.0) {
            ..2.5 => (1, 0.0, 0.96),
            ..4.0 => (2, 0.5, 0.5),
            _ => (3, 0.54, 0.47),
        };
        let step = if count == 2 { HALF } else { THIRD };
        let mut place = r.turn();
        let berries = (0..count).map(|_| {
            place = place.plus(step);
            let up = (r.vector(0.7) + Vec3::new(0.0, 1.0, 0.0)).unit();
            let side = Vec3::new(up.y, -up.x, 0.0).unit();
            Berry {
                center: Vec3::new(place.cos, r.within(-0.1, 0.1), place.sin) * apart,
                radius: size * r.within(0.88, 1.0),
                axes: [side, up, side.cross(up)],
            }
        });
        Self {
            berries: berries.collect(),
            bloom: r.within(0.15, 0.85),
            grain: r.vector(50.0),
        }
    }
}

impl Solid for Blueberries {
    fn distance(&self, p: Vec3) -> f32 {
        self.berries
            .iter()
            .map(|berry| berry.distance(p))
            .fold(f32::MAX, f32::min)
    }

    fn skin(&self, p: Vec3) -> Skin {
        let nearest = self
            .berries
            .iter()
            .min_by(|a, b| a.distance(p).total_cmp(&b.distance(p)));
        let q = nearest.map_or(p, |berry| berry.local(p));
        // A waxy bloom, rubbed off in places.
        let wax = self.bloom + 0.55 * clouds(p * 3.5 + self.grain);
        let color = rgb(36, 38, 78).mix(rgb(118, 136, 184), smoothstep(0.0, 1.2, wax));
        let crown = smoothstep(0.4, 0.3, off_axis(q)) * smoothstep(0.5, 0.6, q.y);
        let hollow = smoothstep(0.26, 0.2, off_axis(q)) * crown;
        Skin {
            color: color
                .mix(rgb(44, 40, 66), crown * 0.6)
                .mix(rgb(84, 66, 62), hollow * 0.6),
            gloss: 0.2,
            bump: roughness(p * 14.0 + self.grain) * 0.06,
        }
    }
}

/// A hairy ellipsoid along y; whole, or the lower half of one with its face up.
struct Kiwi {
    axes: Vec3,
    cut: bool,
    /// The height of the cut.
    face: f32,
    /// On the face, which is about 1 in radius.
    seeds: Vec<(f32, f32)>,
    flesh: Vec3,
    hair: Vec3,
    grain: Vec3,
}

impl Kiwi {
    fn grow(r: &mut Random) -> Self {
        let cut = r.chance(0.5);
        let mut place = r.turn();
        let seeds = (0..44).map(|_| {
            place = place.plus(KIWI);
            let off = r.within(0.33, 0.5);
            (place.cos * off, place.sin * off)
        });
        let seeds = seeds.collect();
        let (width, height) = if cut {
            (0.96, 1.05)
        } else {
            (r.within(0.72, 0.84), 0.97)
        };
        Self {
            axes: Vec3::new(width, height, width * r.within(0.86, 1.0)),
            cut,
            face: r.within(0.15, 0.35),
            seeds,
            flesh: rgb(136, 174, 44).mix(rgb(166, 184, 62), r.within(0.0, 1.0)),
            hair: rgb(128, 96, 54).mix(rgb(152, 120, 72), r.within(0.0, 1.0)),
            grain: r.vector(50.0),
        }
    }
}

impl Solid for Kiwi {
    fn distance(&self, p: Vec3) -> f32 {
        if self.cut {
            let q = Vec3::new(p.x, p.y - self.face, p.z);
            ellipsoid(q, self.axes).max(q.y)
        } else {
            // Blunt at the ends.
            let knob = segment(p, Vec3::new(0.0, 0.9, 0.0), Vec3::new(0.0, 0.94, 0.0)).0 - 0.07;
            smooth_min(ellipsoid(p, self.axes), knob, 0.1)
        }
    }

    fn skin(&self, p: Vec3) -> Skin {
        if self.cut && p.y > self.face - 0.01 {
            let (x, z) = (p.x / self.axes.x, p.z / self.axes.z);
            let off = (x * x + z * z).sqrt();
            let rays = noise(Vec3::new(x, 0.0, z) * (9.0 / off.max(1e-3)) + self.grain);
            let core = smoothstep(0.3, 0.2, off + 0.05 * noise(Vec3::new(x, 0.0, z) * 9.0 + self.grain));
            let pale = smoothstep(0.2, 0.8, rays) * smoothstep(0.75, 0.4, off) * 0.45;
            let color = self.flesh.mix(self.flesh * 0.62, smoothstep(0.6, 0.95, off));
            let color = color.mix(rgb(206, 212, 124), pale).mix(rgb(226, 222, 168), core);
            let seed = self.seeds.iter().fold(0.0, |darkest: f32, &(sx, sz)| {
                // Longer towards the core than across.
                let (dx, dz) = (x - sx, z - sz);
                let length = (sx * sx + sz * sz).sqrt();
                let (along, across) = ((dx * sx + dz * sz) / length, (dz * sx - dx * sz) / length);
                darkest.max(1.0 - (along * along * 280.0 + across * across * 1100.0))
            });
            let rim = smoothstep(0.95, 0.975, off);
            return Skin {
                color: color
                    .mix(rgb(30, 24, 20), smoothstep(0.0, 0.4, seed))
                    .mix(self.hair, rim),
                gloss: 0.25 * (1.0 - rim),
                bump: roughness(p * 12.0 + self.grain) * 0.05,
            };
        }
        let fuzz = noise(Vec3::new(p.x * 34.0, p.y * 12.0, p.z * 34.0) + self.grain);
        let blotch = clouds(p * 3.0 + self.grain);
        let ends = smoothstep(0.9, 0.96, p.y.abs());
        Skin {
            color: (self.hair * (1.0 + 0.22 * fuzz + 0.15 * blotch)).mix(rgb(74, 52, 32), ends),
            gloss: 0.03,
            bump: roughness(Vec3::new(p.x * 28.0, p.y * 17.0, p.z * 28.0) + self.grain) * 0.2,
        }
    }
}

/// An ellipsoid along y with a nipple at the top and a smaller one below.
struct Lemon {
    axes: Vec3,
    tip: f32,
    color: Vec3,
    green: f32,
    grain: Vec3,
}

impl Lemon {
    fn grow(r: &mut Random) -> Self {
        let girth = r.within(0.58, 0.68);
        Self {
            axes: Vec3::new(girth, 0.82, girth),
            tip: r.within(0.13, 0.18),
            color: rgb(244, 206, 36).mix(rgb(236, 190, 28), r.within(0.0, 1.0)),
            green: r.within(-0.6, 0.5),
            grain: r.vector(50.0),
        }
    }
}

impl Solid for Lemon {
    fn distance(&self, p: Vec3) -> f32 {
        let body = ellipsoid(p, self.axes);
        let top = segment(p, Vec3::new(0.0, 0.6, 0.0), Vec3::new(0.0, 0.96 - self.tip, 0.0)).0 - self.tip;
        let bottom = segment(p, Vec3::new(0.0, -0.6, 0.0), Vec3::new(0.0, -0.82, 0.0)).0 - 0.1;
        smooth_min(smooth_min(body, top, 0.22), bottom, 0.2)
    }

    fn skin(&self, p: Vec3) -> Skin {
        let green = self.green + 0.5 * clouds(p * 1.6 + self.grain) + 0.4 * p.y.abs();
        let pores = smoothstep(0.35, 0.8, noise(p * 19.0 + self.grain));
        let scar = smoothstep(0.07, 0.04, off_axis(p)) * smoothstep(-0.5, -0.8, p.y);
        Skin {
            color: (self.color * (1.0 - 0.12 * pores))
                .mix(rgb(156, 172, 40), smoothstep(0.2, 1.1, green))
                .mix(rgb(110, 92, 44), scar),
            gloss: 0.4,
            bump: roughness(p * 19.0 + self.grain) * 0.09,
        }
    }
}

/// A ball, a little flat, with pores and the button of its stem.
struct Orange {
    axes: Vec3,
    color: Vec3,
    grain: Vec3,
}

impl Orange {
    fn grow(r: &mut Random) -> Self {
        Self {
            axes: Vec3::new(0.96, r.within(0.86, 0.97), 0.96),
            color: rgb(240, 130, 16)
                .mix(rgb(228, 104, 10), r.within(0.0, 1.0))
                .mix(rgb(238, 158, 30), r.within(-0.5, 0.6)),
            grain: r.vector(50.0),
        }
    }
}

impl Solid for Orange {
    fn distance(&self, p: Vec3) -> f32 {
        let body = ellipsoid(p, self.axes);
        // A shallow dent around the stem.
        body + 0.05 * smoothstep(0.3, 0.0, off_axis(p)) * smoothstep(0.0, 0.5, p.y)
    }

    fn skin(&self, p: Vec3) -> Skin {
        let off = off_axis(p);
        let pores = smoothstep(0.2, 0.75, noise(p * 21.0 + self.grain));
        let color = self.color * (1.0 - 0.22 * pores + 0.08 * clouds(p * 2.0 + self.grain));
        let lobes = 0.05 + 0.08 * smoothstep(0.84, 1.0, star(p.x, p.z));
        let button = if p.y > 0.0 {
            smoothstep(lobes + 0.03, lobes - 0.02, off)
        } else {
            0.0
        };
        let navel = if p.y < 0.0 { smoothstep(0.06, 0.02, off) } else { 0.0 };
        let stem = if p.y > 0.0 { smoothstep(0.05, 0.03, off) } else { 0.0 };
        Skin {
            color: color
                .mix(rgb(88, 116, 44), button)
                .mix(rgb(150, 130, 84), stem)
                .mix(rgb(120, 70, 20), navel),
            gloss: 0.35,
            bump: roughness(p * 24.0 + self.grain) * 0.13,
        }
    }
}

/// An ellipsoid along y with a crease from pole to pole and a waxy bloom.
struct Plum {
    axes: Vec3,
    crease: f32,
    stem: Option<Stem>,
    dark: Vec3,
    light: Vec3,
    bloom: f32,
    grain: Vec3,
}

impl Plum {
    fn grow(r: &mut Random) -> Self {
        let girth = r.within(0.74, 0.86);
        let lean = r.vector(0.1);
        Self {
            axes: Vec3::new(girth, 0.93, girth * 0.95),
            crease: r.within(0.05, 0.09),
            stem: r
                .chance(0.3)
                .then(|| Stem(Vec3::new(0.0, 0.8, 0.0), Vec3::new(lean.x, 1.0, lean.z), 0.025)),
            dark: rgb(58, 18, 40).mix(rgb(74, 14, 30), r.within(0.0, 1.0)),
            light: rgb(150, 34, 48).mix(rgb(122, 40, 70), r.within(0.0, 1.0)),
            bloom: r.within(-0.5, 0.35),
            grain: r.vector(50.0),
        }
    }

    fn flesh(&self, p: Vec3) -> f32 {
        let groove = if p.z > 0.0 {
            smoothstep(0.22, 0.0, p.x.abs()) * smoothstep(0.0, 0.5, p.z + 0.25 * p.y.max(0.0))
        } else {
            0.0
        };
        let dent = smoothstep(0.35, 0.0, off_axis(p)) * smoothstep(0.2, 0.8, p.y);
        (ellipsoid(p, self.axes) + self.crease * groove + 0.1 * dent) * 0.9
    }
}

impl Solid for Plum {
    fn distance(&self, p: Vec3) -> f32 {
        let flesh = self.flesh(p);
        self.stem.as_ref().map_or(flesh, |stem| flesh.min(stem.distance(p)))
    }

    fn skin(&self, p: Vec3) -> Skin {
        if self.stem.as_ref().is_some_and(|stem| stem.distance(p) < self.flesh(p)) {
            return Stem::skin(p);
        }
        let ripe = 0.2 + 0.8 * clouds(p * 1.4 + self.grain);
        let color = self.dark.mix(self.light, smoothstep(-0.1, 0.9, ripe));
        let wax = self.bloom + clouds(Vec3::new(p.x * 4.5, p.y * 2.5, p.z * 4.5) - self.grain);
        let wax = smoothstep(0.0, 0.7, wax) * 0.55;
        let dots = smoothstep(0.6, 0.8, noise(p * 15.0 + self.grain));
        Skin {
            color: color.mix(rgb(190, 110, 96), 0.3 * dots).mix(rgb(132, 124, 160), wax),
            gloss: 0.5 * (1.0 - wax),
            bump: roughness(p * 5.0 + self.grain) * 0.04,
        }
    }
}

/// A cone, rounded, its tip down, with seeds in pits and leaves on top.
struct Strawberry {
    /// The radius at the shoulder and the one at the tip.
    wide: f32,
    narrow: f32,
    /// From the top down.
    seeds: Vec<Vec3>,
    /// From where to where.
    leaves: Vec<(Vec3, Vec3)>,
    stem: Stem,
    color: Vec3,
    pale: f32,
    grain: Vec3,
}

/// The heights of the centres of the two balls.
const SHOULDER: f32 = 0.16;
const TIP: f32 = -0.72;

impl Strawberry {
    fn grow(r: &mut Random) -> Self {
        let wide = r.within(0.54, 0.64);
        let narrow = r.within(0.16, 0.24);
        // Each at the golden angle from the one above it, as plants do it.
        let mut place = r.turn();
        let seeds = (0..110).map(|i| {
            place = place.plus(GOLDEN);
            let share = (i as f32 + 0.5) / 110.0;
            let height = 0.62 - 1.5 * share * (1.4 - 0.4 * share);
            let off = cone_radius(height, wide, narrow);
            Vec3::new(place.cos * off, height, place.sin * off)
        });
        let seeds = seeds.collect();
        let turn = r.turn();
        let leaves = STAR.iter().flat_map(|point| [*point, point.opposite()]).map(|point| {
            let point = point.plus(turn);
            let at = |off, height| Vec3::new(point.cos * off, height, point.sin * off);
            (at(0.05, 0.68), at(r.within(0.38, 0.56), 0.64 + r.within(-0.02, 0.2)))
        });
        let leaves = leaves.collect();
        let lean = r.vector(0.2);
        Self {
            wide,
            narrow,
            seeds,
            leaves,
            stem: Stem(
                Vec3::new(0.0, 0.66, 0.0),
                Vec3::new(lean.x, r.within(0.8, 0.98), lean.z),
                0.03,
            ),
            color: rgb(206, 22, 26).mix(rgb(158, 10, 22), r.within(0.0, 1.0)),
            pale: r.within(-0.6, 0.35),
            grain: r.vector(50.0),
        }
    }

    fn leaves(&self, p: Vec3) -> f32 {
        // Far from the leaves a ball around them is bound enough.
        let ball = (p - Vec3::new(0.0, 0.72, 0.0)).length() - 0.6;
        if ball > 0.1 {
            return ball;
        }
        let green = self.leaves.iter().map(|&(from, to)| {
            let (_, along) = segment(p, from, to);
            let q = p - (from + (to - from) * along);
            let bow = 0.06 * (4.0 * along * (1.0 - along)) - 0.02;
            let width = 0.13 * (1.0 - along) * (0.45 + 2.2 * along).min(1.0) + 0.012;
            let (up, side) = (q.y - bow, (q.x * q.x + q.z * q.z).sqrt());
            let flat = ((side - width).max(0.0), (up.abs() - 0.012).max(0.0));
            (flat.0 * flat.0 + flat.1 * flat.1).sqrt() - 0.012
        });
        green.fold(self.stem.distance(p), f32::min) * 0.7
    }

    fn flesh(&self, p: Vec3) -> f32 {
        cone(off_axis(p), p.y, self.wide, self.narrow)
    }
}

/// The distance to two balls on the y axis and the cone around them.
fn cone(off: f32, y: f32, wide: f32, narrow: f32) -> f32 {
    let height = SHOULDER - TIP;
    let sin = (wide - narrow) / height;
    let cos = (1.0 - sin * sin).sqrt();
    let up = y - TIP;
    // Along and across the cone's side.
    let along = up * cos + off * sin;
    if along < 0.0 {
        (off * off + up * up).sqrt() - narrow
    } else if along > height * cos {
        (off * off + (up - height) * (up - height)).sqrt() - wide
    } else {
        off * cos - up * sin - narrow
    }
}

/// The radius of the [`cone`]'s surface at the height `y`.
fn cone_radius(y: f32, wide: f32, narrow: f32) -> f32 {
    (0..12).fold(0.4, |off: f32, _| (off - cone(off, y, wide, narrow)).max(0.02))
}

impl Solid for Strawberry {
    fn distance(&self, p: Vec3) -> f32 {
        self.flesh(p).min(self.leaves(p))
    }

    fn skin(&self, p: Vec3) -> Skin {
        if self.leaves(p) < self.flesh(p) {
            let color = rgb(74, 128, 38) * (1.0 + 0.3 * noise(p * 12.0 + self.grain));
            return Skin {
                color,
                gloss: 0.1,
                bump: roughness(p * 16.0) * 0.15,
            };
        }
        let shoulder = smoothstep(0.3, 0.75, p.y + self.pale * 0.5 + 0.1 * clouds(p * 3.0 + self.grain));
        let color = (self.color * (1.0 + 0.15 * clouds(p * 2.0 + self.grain))).mix(rgb(228, 190, 130), shoulder * 0.7);
        // Only seeds at about this height can be the nearest.
        let below = self.seeds.partition_point(|s| s.y > p.y + 0.11);
        let near = self.seeds[below..].iter().take_while(|s| s.y > p.y - 0.11);
        let seed = near.map(|s| *s - p).fold(Vec3::new(1.0, 1.0, 1.0), |best, s| {
            if s.dot(s) < best.dot(best) { s } else { best }
        });
        let long = Vec3::new(seed.x, seed.y * 0.6, seed.z).length();
        let pit = smoothstep(0.085, 0.03, seed.length());
        Skin {
            color: (color * (1.0 - 0.35 * pit)).mix(rgb(228, 190, 92), smoothstep(0.03, 0.016, long)),
            gloss: 0.45,
            bump: seed * (6.0 * smoothstep(0.11, 0.07, seed.length())),
        }
    }
}

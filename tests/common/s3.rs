//! A real S3 server on loopback: `s3s-fs` behind signature checks, which records what it is asked
//! and misbehaves on demand.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::Cursor;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use image::{ImageFormat, Rgb, RgbImage};
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::{S3Auth, SecretKey};
use s3s::dto::{
    AbortMultipartUploadInput, AbortMultipartUploadOutput, CompleteMultipartUploadInput, CompleteMultipartUploadOutput,
    CreateMultipartUploadInput, CreateMultipartUploadOutput, DeleteObjectInput, DeleteObjectOutput, GetObjectInput,
    GetObjectOutput, HeadObjectInput, HeadObjectOutput, ListObjectsV2Input, ListObjectsV2Output, Object,
    PutObjectInput, PutObjectOutput, Timestamp, UploadPartInput, UploadPartOutput,
};
use s3s::service::S3ServiceBuilder;
use s3s::{S3, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;

const ACCESS_KEY: &str = "POMONATESTACCESSKEY";
pub(crate) const SECRET_KEY: &str = "a/secret+that-no-message-may-hold";

/// What the access keys of executors start with. Their secret is the same.
pub(crate) const EXECUTOR: &str = "executor-";

/// A small image; every shade is another.
pub(crate) fn picture(shade: u8) -> Vec<u8> {
    let mut png = Cursor::new(Vec::new());
    let image = RgbImage::from_fn(8, 8, |x, y| Rgb([shade, x as u8 * 30, y as u8 * 30]));
    image.write_to(&mut png, ImageFormat::Png).unwrap();
    png.into_inner()
}

/// A request whose signature was right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    /// S3's name of the operation: `GetObject`, `ListObjectsV2`, ...
    pub(crate) operation: &'static str,
    /// The object's key, or the prefix of a LIST.
    pub(crate) key: String,
    /// The access key that signed it; empty where nobody did.
    pub(crate) client: String,
}

/// How the server misbehaves with one key.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// Answers 503 so many times.
    SlowDown(usize),
    /// Answers 403.
    Deny,
    /// Lists the object, and has lost it afterwards.
    Vanish,
}

#[derive(Debug, Default)]
struct Behaviour {
    requests: Vec<Request>,
    faults: HashMap<String, Fault>,
    folder_markers: Vec<String>,
    public_buckets: HashSet<String>,
    page_size: Option<i32>,
    region: Option<&'static str>,
    held: Option<Held>,
}

/// GETs of executors that wait.
#[derive(Debug)]
struct Held {
    prefix: String,
    /// Those that came.
    came: usize,
}

/// The server; it stops when it is dropped.
pub(crate) struct S3Server {
    address: SocketAddr,
    root: TempDir,
    behaviour: Arc<Mutex<Behaviour>>,
    /// How many of the GETs that are held are answered.
    answered: watch::Sender<usize>,
    // Threads of its own: a test may block while the server answers.
    runtime: Option<Runtime>,
}

impl S3Server {
    /// A server that holds these buckets.
    pub(crate) fn start(buckets: &[&str]) -> Self {
        let root = TempDir::new().unwrap();
        for bucket in buckets {
            fs::create_dir(root.path().join(bucket)).unwrap();
        }
        let behaviour = Arc::<Mutex<Behaviour>>::default();
        let (answered, answers) = watch::channel(usize::MAX);
        let recorder = Recorder {
            root: root.path().to_owned(),
            files: FileSystem::new(root.path()).unwrap(),
            behaviour: Arc::clone(&behaviour),
            answers,
        };
        let mut service = S3ServiceBuilder::new(recorder);
        service.set_auth(OneSecret);
        service.set_access(SignedOrPublic {
            behaviour: Arc::clone(&behaviour),
        });
        let service = service.build();

        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let address = socket.local_addr().unwrap();
        let connections = runtime.handle().clone();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(socket).unwrap();
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                connections.spawn(async move {
                    // A client may hang up whenever it likes.
                    let _ = Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(socket), service)
                        .await;
                });
            }
        });
        Self {
            address,
            root,
            behaviour,
            answered,
            runtime: Some(runtime),
        }
    }

    /// Where it listens.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The environment in which a process reaches it, with the right credentials.
    pub(crate) fn environment(&self) -> [(&'static str, String); 3] {
        self.environment_of(ACCESS_KEY)
    }

    /// The environment in which a process reaches it, known by this access key.
    pub(crate) fn environment_of(&self, access_key: &str) -> [(&'static str, String); 3] {
        [
            ("AWS_ENDPOINT_URL", self.endpoint()),
            ("AWS_ACCESS_KEY_ID", access_key.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
        ]
    }

    /// The options with which a table reaches it.
    pub(crate) fn options(&self) -> String {
        self.options_with(SECRET_KEY)
    }

    /// The options with which a table reaches it, with this secret.
    pub(crate) fn options_with(&self, secret: &str) -> String {
        format!(
            "'aws.endpoint' '{}', 'aws.access_key_id' '{ACCESS_KEY}', 'aws.secret_access_key' '{secret}'",
            self.endpoint()
        )
    }

    fn file(&self, bucket: &str, key: &str) -> PathBuf {
        self.root.path().join(bucket).join(key)
    }

    /// Puts an object where the server finds it, without a request.
    pub(crate) fn put(&self, bucket: &str, key: &str, content: &[u8]) {
        let file = self.file(bucket, key);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }

    /// The folder in which the server keeps a bucket's objects, one file each.
    pub(crate) fn folder(&self, bucket: &str) -> PathBuf {
        self.root.path().join(bucket)
    }

    /// The keys of a bucket, sorted.
    pub(crate) fn keys(&self, bucket: &str) -> Vec<String> {
        fn walk(folder: &Path, files: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, files);
                } else {
                    files.push(path);
                }
            }
        }
        let folder = self.folder(bucket);
        let mut files = Vec::new();
        walk(&folder, &mut files);
        let mut keys: Vec<_> = files
            .iter()
            .map(|file| file.strip_prefix(&folder).unwrap().to_str().unwrap().to_owned())
            .collect();
        keys.sort();
        keys
    }

    /// Misbehaves with a key, in every bucket.
    pub(crate) fn fail(&self, key: &str, fault: Fault) {
        self.behaviour.lock().unwrap().faults.insert(key.to_owned(), fault);
    }

    /// Lists a "folder", an empty object whose key ends in `/`, as consoles create them.
    pub(crate) fn mark_folder(&self, key: &str) {
        self.behaviour.lock().unwrap().folder_markers.push(key.to_owned());
    }

    /// Answers requests for this bucket that have no signature.
    pub(crate) fn make_public(&self, bucket: &str) {
        self.behaviour.lock().unwrap().public_buckets.insert(bucket.to_owned());
    }

    /// Lists at most so many keys in one answer.
    pub(crate) fn set_page_size(&self, keys: i32) {
        self.behaviour.lock().unwrap().page_size = Some(keys);
    }

    /// Redirects requests that were signed for another region, as S3 does.
    pub(crate) fn move_to(&self, region: &'static str) {
        self.behaviour.lock().unwrap().region = Some(region);
    }

    /// Answers so many of the next GETs that executors send for keys with this prefix, and lets the others
    /// wait for [`release_gets`](Self::release_gets).
    pub(crate) fn hold_gets(&self, prefix: &str, answered: usize) {
        self.answered.send_replace(answered);
        self.behaviour.lock().unwrap().held = Some(Held {
            prefix: prefix.to_owned(),
            came: 0,
        });
    }

    /// Answers the GETs that wait, and all that come.
    pub(crate) fn release_gets(&self) {
        self.behaviour.lock().unwrap().held = None;
        self.answered.send_replace(usize::MAX);
    }

    /// How many GETs this client has sent since what it was asked was taken.
    pub(crate) fn gets_of(&self, client: &str) -> usize {
        self.gets_below(client, "")
    }

    /// The same, of keys with this prefix.
    pub(crate) fn gets_below(&self, client: &str, prefix: &str) -> usize {
        let behaviour = self.behaviour.lock().unwrap();
        let gets = behaviour
            .requests
            .iter()
            .filter(|request| request.operation == "GetObject");
        gets.filter(|request| request.client == client && request.key.starts_with(prefix))
            .count()
    }

    /// What it was asked since the last call.
    pub(crate) fn take_requests(&self) -> Vec<Request> {
        std::mem::take(&mut self.behaviour.lock().unwrap().requests)
    }

    /// The keys of this operation since the last call, sorted; forgets all other requests.
    pub(crate) fn take_keys(&self, operation: &str) -> Vec<String> {
        let requests = self
            .take_requests()
            .into_iter()
            .filter(|request| request.operation == operation);
        let mut keys: Vec<_> = requests.map(|request| request.key).collect();
        keys.sort();
        keys
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Everybody has the same secret, and executors have access keys of their own.
struct OneSecret;

#[async_trait::async_trait]
impl S3Auth for OneSecret {
    async fn get_secret_key(&self, access_key: &str) -> S3Result<SecretKey> {
        if access_key == ACCESS_KEY || access_key.starts_with(EXECUTOR) {
            Ok(SecretKey::from(SECRET_KEY))
        } else {
            Err(s3_error!(InvalidAccessKeyId, "There is no such access key"))
        }
    }
}

struct SignedOrPublic {
    behaviour: Arc<Mutex<Behaviour>>,
}

#[async_trait::async_trait]
impl S3Access for SignedOrPublic {
    async fn check(&self, context: &mut S3AccessContext<'_>) -> S3Result<()> {
        let bucket = context.s3_path().get_bucket_name().unwrap_or_default();
        if context.credentials().is_some() || self.behaviour.lock().unwrap().public_buckets.contains(bucket) {
            Ok(())
        } else {
            Err(s3_error!(AccessDenied, "Access Denied"))
        }
    }
}

struct Recorder {
    root: PathBuf,
    files: FileSystem,
    behaviour: Arc<Mutex<Behaviour>>,
    answers: watch::Receiver<usize>,
}

impl Recorder {
    /// Records a request, and refuses it where it is told to.
    fn receive<T>(&self, operation: &'static str, key: &str, request: &S3Request<T>) -> S3Result<()> {
        let mut behaviour = self.behaviour.lock().unwrap();
        behaviour.requests.push(Request {
            operation,
            key: key.to_owned(),
            client: client_of(request),
        });
        if let (Some(home), Some(region)) = (behaviour.region, &request.region)
            && region.as_str() != home
        {
            return Err(s3_error!(PermanentRedirect, "The bucket is in another region"));
        }
        match behaviour.faults.get_mut(key) {
            Some(Fault::SlowDown(times)) if *times > 0 => {
                *times -= 1;
                Err(s3_error!(SlowDown, "Please reduce your request rate"))
            }
            Some(Fault::Deny) => Err(s3_error!(AccessDenied, "Access Denied")),
            _ => Ok(()),
        }
    }

    /// Waits where GETs of this client for this key are held.
    async fn hold(&self, client: &str, key: &str) {
        let ticket = {
            let mut behaviour = self.behaviour.lock().unwrap();
            match &mut behaviour.held {
                Some(held) if client.starts_with(EXECUTOR) && key.starts_with(&held.prefix) => {
                    held.came += 1;
                    held.came
                }
                _ => return,
            }
        };
        // Without the server, nobody is asking any more.
        let _ = self.answers.clone().wait_for(|answered| ticket <= *answered).await;
    }
}

fn client_of<T>(request: &S3Request<T>) -> String {
    let credentials = request.credentials.as_ref();
    credentials.map_or_else(String::new, |credentials| credentials.access_key.clone())
}

#[async_trait::async_trait]
impl S3 for Recorder {
    async fn list_objects_v2(
        &self,
        mut request: S3Request<ListObjectsV2Input>,
    ) -> S3Result<S3Response<ListObjectsV2Output>> {
        let prefix = request.input.prefix.clone().unwrap_or_default();
        self.receive("ListObjectsV2", &prefix, &request)?;
        let bucket = request.input.bucket.clone();
        let first_page = request.input.continuation_token.is_none();
        request.input.max_keys = self.behaviour.lock().unwrap().page_size.or(request.input.max_keys);
        let mut response = self.files.list_objects_v2(request).await?;

        let contents = response.output.contents.get_or_insert_default();
        let behaviour = self.behaviour.lock().unwrap();
        for key in contents.iter().filter_map(|object| object.key.as_deref()) {
            if let Some(Fault::Vanish) = behaviour.faults.get(key) {
                fs::remove_file(self.root.join(&bucket).join(key)).unwrap();
            }
        }
        for key in behaviour
            .folder_markers
            .iter()
            .filter(|key| first_page && key.starts_with(&prefix))
        {
            contents.push(Object {
                key: Some(key.clone()),
                size: Some(0),
                last_modified: Some(Timestamp::from(SystemTime::now())),
                ..Object::default()
            });
        }
        Ok(response)
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        self.receive("GetObject", &request.input.key, &request)?;
        self.hold(&client_of(&request), &request.input.key).await;
        self.files.get_object(request).await
    }

    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        self.receive("HeadObject", &request.input.key, &request)?;
        self.files.head_object(request).await
    }

    async fn put_object(&self, request: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        self.receive("PutObject", &request.input.key, &request)?;
        self.files.put_object(request).await
    }

    async fn delete_object(&self, request: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.receive("DeleteObject", &request.input.key, &request)?;
        self.files.delete_object(request).await
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        self.receive("CreateMultipartUpload", &request.input.key, &request)?;
        self.files.create_multipart_upload(request).await
    }

    async fn upload_part(&self, request: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        self.receive("UploadPart", &request.input.key, &request)?;
        self.files.upload_part(request).await
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        self.receive("CompleteMultipartUpload", &request.input.key, &request)?;
        self.files.complete_multipart_upload(request).await
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        self.receive("AbortMultipartUpload", &request.input.key, &request)?;
        self.files.abort_multipart_upload(request).await
    }
}

//! Reading and writing networks without holding their bytes beside them: a network of 100 MB takes 100 MB
//! while it is read or written, not two or three times as much.

use std::io::{self, Read, Write};

use prost::bytes::Buf;
use prost::{DecodeError, Message};
use tract_onnx::pb::{GraphProto, ModelProto};

/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;

/// Why a network cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// The file cannot.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is no network, or cut off.
    #[error(transparent)]
    Decode(#[from] DecodeError),
}

/// Reads a network of `length` bytes.
///
/// # Errors
/// Where the reader fails, or gives something else.
pub(super) fn read(reader: impl Read, length: usize) -> Result<ModelProto, ReadError> {
    let mut source = Source {
        reader,
        unread: length,
        chunk: vec![],
        at: 0,
        failure: None,
    };
    source.fill();
    let decoded = ModelProto::decode(&mut source);
    match source.failure {
        Some(error) => Err(error.into()),
        None => Ok(decoded?),
    }
}

/// Writes a network, and frees its weights one by one.
///
/// Messages in a row are one: what follows is merged into what came before, which is how each weight can be
/// written alone.
///
/// # Errors
/// Where the writer fails.
pub(super) fn write(mut network: ModelProto, mut writer: impl Write) -> io::Result<()> {
    let weights = network
        .graph
        .as_mut()
        .map(|graph| std::mem::take(&mut graph.initializer));
    writer.write_all(&network.encode_to_vec())?;
    drop(network);
    for weight in weights.into_iter().flatten() {
        let part = ModelProto {
            graph: Some(GraphProto {
                initializer: vec![weight],
                ..GraphProto::default()
            }),
            ..ModelProto::default()
        };
        writer.write_all(&part.encode_to_vec())?;
    }
    writer.flush()
}

/// A reader as the decoder's buffer. After a failure it is at its end, and the decoder stops.
struct Source<R> {
    reader: R,
    /// Bytes that are still in the reader.
    unread: usize,
    chunk: Vec<u8>,
    at: usize,
    failure: Option<io::Error>,
}

impl<R: Read> Source<R> {
    fn fill(&mut self) {
        self.chunk.resize(self.unread.min(CHUNK), 0);
        self.at = 0;
        self.unread -= self.chunk.len();
        if let Err(error) = self.reader.read_exact(&mut self.chunk) {
            self.failure = Some(error);
            self.chunk.clear();
            self.unread = 0;
        }
    }
}

impl<R: Read> Buf for Source<R> {
    fn remaining(&self) -> usize {
        self.unread + (self.chunk.len() - self.at)
    }

    fn chunk(&self) -> &[u8] {
        &self.chunk[self.at..]
    }

    fn advance(&mut self, mut count: usize) {
        while count > 0 && self.failure.is_none() {
            let step = count.min(self.chunk.len() - self.at);
            self.at += step;
            count -= step;
            if self.at == self.chunk.len() && self.unread > 0 {
                self.fill();
            } else if step == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::networks::onnx;
    use super::*;

    #[test]
    fn a_network_is_read_and_written_as_it_is() {
        let bytes = onnx("resnet50-keras", 16, 64);
        assert!(bytes.len() > 3 * CHUNK);
        let expected = ModelProto::decode(bytes.as_slice()).unwrap();
        let network = read(bytes.as_slice(), bytes.len()).unwrap();
        assert_eq!(network, expected);

        let mut written = vec![];
        write(network, &mut written).unwrap();
        assert_eq!(ModelProto::decode(written.as_slice()).unwrap(), expected);
    }

    #[test]
    fn what_is_cut_off_is_an_error() {
        let bytes = onnx("resnet50-keras", 16, 64);
        for length in [0, 1, 100, CHUNK, bytes.len() - 1] {
            let cut = read(&bytes[..length], length);
            assert!(length == 0 || cut.is_err(), "{length}");
            assert!(read(&bytes[..length], bytes.len()).is_err(), "{length}");
        }
    }
}

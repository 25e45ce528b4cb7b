//! What goes over a connection.
//!
//! A frame is six words (kind, group, round, from, to, length of the body; 8 bytes each, little
//! endian), a tag of 16 bytes, and the body. The tag is a truncated HMAC-SHA-256 under the job's
//! token, of the nonces of both ends, the rank that sends, the frame's number on the connection,
//! the six words, and the SHA-256 of the body. A frame that was changed, repeated, left out or
//! moved ends the connection.

use crate::error::{LostReason, Mismatch};
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use std::{
    io::{self, ErrorKind, Read, Write},
    ops::Deref,
    sync::{Arc, OnceLock},
};

/// No frame is longer: the link is not for bulk data. Twice what a collective or a message puts
/// into one, which leaves the other half to descriptions of calls.
const LONGEST: u64 = 2 * super::MOST as u64 + (1 << 20);

/// The bytes of a tag.
const TAG: usize = 16;

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// To the first rank: rank `from` of `to` ranks gives its part of a round.
    Part = 1,
    /// To a rank: all parts of a round.
    Parts,
    /// From one rank to another.
    Letter,
    /// Rank `from` was lost, how: `to`. The body says how many rounds of which group it took part
    /// in, and steps beside it. If it had been told of a loss before, `round` is the rank that was
    /// lost then and one, and `group` how.
    Lost,
    /// To a rank that said that it leaves: nothing more will be sent.
    Bye,
    /// The ranks of a group disagree.
    Broken,
    /// To the first rank: its sender waits for this round no longer. The body says for how long it
    /// has, in nanoseconds, and of which ranks of the world the group consists.
    GiveUp,
    /// To all: a rank of the group has waited for others for too long: for `round` nanoseconds, for
    /// the ranks of the world that the body names.
    Late,
    /// From rank `from` to rank `to`: how many steps of this work has it come to?
    Ask,
    /// The answer: `round`.
    Answer,
    /// To the first rank: rank `from` waits for a message of rank `to`, of whom it has received
    /// `round` in this group. The body says their places in the group, and what call waits.
    Stand,
}

impl Kind {
    const ALL: [Self; 11] = [
        Self::Part,
        Self::Parts,
        Self::Letter,
        Self::Lost,
        Self::Bye,
        Self::Broken,
        Self::GiveUp,
        Self::Late,
        Self::Ask,
        Self::Answer,
        Self::Stand,
    ];
}

/// Bytes that the frames of several ranks share, and their hash.
#[derive(Clone, Debug, Default)]
pub(super) struct Body(Arc<(Vec<u8>, OnceLock<[u8; 32]>)>);

impl Body {
    fn digest(&self) -> &[u8; 32] {
        self.0.1.get_or_init(|| Sha256::digest(&self.0.0).into())
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Arc::new((bytes, OnceLock::new())))
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0.0
    }
}

/// An HMAC-SHA-256 that has its key, and the beginning of its text.
pub(crate) type Keyed = Hmac<Sha256>;

/// One direction of a connection: it numbers and authenticates its frames.
#[derive(Debug)]
pub(super) struct Seal {
    mac: Keyed,
    frames: u64,
}

impl Seal {
    /// The direction from a rank, of a connection with this key and these nonces.
    pub(super) fn new(nonces: &Keyed, from: usize) -> Self {
        Self { mac: nonces.clone().chain_update((from as u64).to_le_bytes()), frames: 0 }
    }

    /// The HMAC of the next frame.
    fn next(&mut self, head: &[u8], body: &Body) -> Keyed {
        let number = self.frames.to_le_bytes();
        self.frames += 1;
        self.mac.clone().chain_update(number).chain_update(head).chain_update(body.digest())
    }
}

/// One message.
#[derive(Clone, Debug)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) group: u64,
    pub(super) round: u64,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) body: Body,
}

impl Frame {
    pub(super) fn new(kind: Kind, group: u64, round: u64, (from, to): (usize, usize), body: Vec<u8>) -> Self {
        Self { kind, group, round, from, to, body: body.into() }
    }

    pub(super) fn write(&self, to: &mut impl Write, seal: &mut Seal) -> io::Result<()> {
        let head = [
            self.kind as u64,
            self.group,
            self.round,
            self.from as u64,
            self.to as u64,
            self.body.len() as u64,
        ];
        let mut head: Vec<u8> = head.iter().flat_map(|word| word.to_le_bytes()).collect();
        let tag = seal.next(&head, &self.body).finalize().into_bytes();
        head.extend(&tag[..TAG]);
        // A short frame is one packet.
        if self.body.len() < 1 << 16 {
            head.extend(&*self.body);
            return to.write_all(&head);
        }
        to.write_all(&head)?;
        to.write_all(&self.body)
    }

    pub(super) fn read(from: &mut impl Read, seal: &mut Seal) -> io::Result<Self> {
        let bad = |what| io::Error::new(ErrorKind::InvalidData, what);
        let mut head = [0; 48];
        from.read_exact(&mut head)?;
        let mut tag = [0; TAG];
        from.read_exact(&mut tag)?;
        let words = Words(&head).collect::<Vec<_>>();
        if words[5] > LONGEST {
            return Err(bad("a frame that is too long"));
        }
        let mut body = Vec::new();
        // Memory grows as the bytes come.
        if from.take(words[5]).read_to_end(&mut body)? as u64 != words[5] {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let body = body.into();
        // In constant time.
        if seal.next(&head, &body).verify_truncated_left(&tag).is_err() {
            return Err(bad("a frame that its sender did not write, or not there"));
        }
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u64 == words[0]);
        let kind = kind.ok_or_else(|| bad("a frame of no known kind"))?;
        Ok(Self {
            kind,
            group: words[1],
            round: words[2],
            from: words[3] as usize,
            to: words[4] as usize,
            body,
        })
    }
}

/// Numbers one after another.
pub(super) struct Words<'a>(pub(super) &'a [u8]);

impl Iterator for Words<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }
}

/// The bytes of numbers one after another: see [`Words`].
pub(super) fn from_words(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Byte strings one after another, each after its length.
#[derive(Default)]
pub(super) struct Strings(pub(super) Vec<u8>);

impl Strings {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend((bytes.len() as u64).to_le_bytes());
        self.0.extend(bytes);
    }

    /// The next string, and what follows it.
    pub(super) fn next(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
        let (len, rest) = bytes.split_first_chunk()?;
        rest.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)
    }

    pub(super) fn all(mut bytes: &[u8]) -> Option<Vec<&[u8]>> {
        let mut strings = Vec::new();
        while !bytes.is_empty() {
            let (string, rest) = Self::next(bytes)?;
            strings.push(string);
            bytes = rest;
        }
        Some(strings)
    }
}

pub(super) fn from_loss(loss: LostReason) -> usize {
    match loss {
        LostReason::Left => 0,
        LostReason::Failed => 1,
        LostReason::Panicked => 2,
        LostReason::Disconnected => 3,
    }
}

pub(super) fn to_loss(code: usize) -> LostReason {
    [LostReason::Left, LostReason::Failed, LostReason::Panicked]
        .get(code)
        .copied()
        .unwrap_or(LostReason::Disconnected)
}

pub(super) fn from_mismatch(mismatch: &Mismatch) -> Vec<u8> {
    let mut strings = Strings::default();
    for number in [mismatch.left_rank, mismatch.right_rank] {
        strings.push(&(number as u64).to_le_bytes());
    }
    strings.push(mismatch.left.as_bytes());
    strings.push(mismatch.right.as_bytes());
    strings.0
}

pub(super) fn to_mismatch(bytes: &[u8]) -> Option<Mismatch> {
    let strings = Strings::all(bytes)?;
    let number = |at: usize| Some(Words(strings.get(at)?).next()? as usize);
    let words = |at: usize| Some(String::from_utf8_lossy(strings.get(at)?).into_owned());
    Some(Mismatch { left_rank: number(0)?, right_rank: number(1)?, left: words(2)?, right: words(3)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmac::KeyInit;

    fn keyed(text: &[u8]) -> Keyed {
        Keyed::new_from_slice(text).unwrap()
    }

    fn written() -> Vec<Vec<u8>> {
        let mut seal = Seal::new(&keyed(b"token"), 1);
        let frame = |body: &[u8]| Frame::new(Kind::Letter, 1 << 63, 5, (3, 4), body.to_vec());
        let frames = [frame(b""), frame(b"words"), frame(&vec![7; 1 << 17])];
        let bytes = frames.map(|frame| {
            let mut to = Vec::new();
            frame.write(&mut to, &mut seal).unwrap();
            to
        });
        bytes.into()
    }

    /// How many of these frames are read.
    fn read(frames: &[Vec<u8>], seal: &mut Seal) -> usize {
        let bytes = frames.concat();
        let mut from = &bytes[..];
        (0..frames.len()).take_while(|_| Frame::read(&mut from, seal).is_ok()).count()
    }

    #[test]
    fn frames_are_read_as_they_were_written() {
        let (frames, mut seal) = (written().concat(), Seal::new(&keyed(b"token"), 1));
        let mut from = &frames[..];
        for len in [0, 5, 1 << 17] {
            let frame = Frame::read(&mut from, &mut seal).unwrap();
            assert_eq!((frame.kind, frame.group, frame.round), (Kind::Letter, 1 << 63, 5));
            assert_eq!((frame.from, frame.to, frame.body.len()), (3, 4, len));
        }
        assert!(from.is_empty());
    }

    #[test]
    fn frames_that_were_changed_repeated_or_left_out_are_refused() {
        let frames = written();
        let seal = || Seal::new(&keyed(b"token"), 1);
        for byte in 0..frames[1].len() {
            let mut changed = frames.clone();
            changed[1][byte] ^= 16;
            assert_eq!(read(&changed, &mut seal()), 1, "byte {byte}");
        }
        let order = |order: &[usize]| order.iter().map(|&at| frames[at].clone()).collect::<Vec<_>>();
        assert_eq!(read(&order(&[0, 0, 1]), &mut seal()), 1);
        assert_eq!(read(&order(&[0, 2]), &mut seal()), 1);
        assert_eq!(read(&order(&[1, 0]), &mut seal()), 0);
        // Another token, or other nonces; the other direction.
        assert_eq!(read(&frames, &mut Seal::new(&keyed(b"guess"), 1)), 0);
        assert_eq!(read(&frames, &mut Seal::new(&keyed(b"token"), 0)), 0);
    }
}

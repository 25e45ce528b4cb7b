//! Frames, the unit that one process sends to another over a connection.
//!
//! A frame is six u64 (kind, group, round, from, to, body length; little endian), a tag of 16
//! bytes, and the body. The tag is a truncated HMAC-SHA-256 with the job's token as key. It covers
//! the nonces of both ranks, the sending rank, the frame's sequence number on the connection, the
//! six u64, and the SHA-256 of the body. If a frame was changed, repeated, dropped or reordered,
//! the receiver closes the connection. Over TLS, which has the same effect, frames have no tag.

use crate::error::{LostReason, Mismatch};
use hmac::{Hmac, Mac};
use sha2::{Digest, Sha256};
use std::{
    fmt,
    io::{self, ErrorKind, Read, Write},
    ops::Deref,
    sync::{Arc, OnceLock},
};

/// The maximum number of bytes in a body: twice the maximum payload and 1 MiB. The part that is not
/// payload holds descriptions of calls.
const MAX_BODY: u64 = 2 * super::MAX_PAYLOAD as u64 + (1 << 20);

/// The number of bytes of a tag.
const TAG_BYTES: usize = 16;

/// The kind of a frame, with the meaning of its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// To rank 0: a rank's input to a round. `from` is the sender's group rank, and `to` the number
    /// of ranks of the group.
    Input = 1,
    /// To a rank: all ranks' inputs to a round.
    Inputs,
    /// A message from one rank to another.
    Message,
    /// Rank `from` was lost, for reason `to`. The body holds the number of rounds by group, and of
    /// external steps by work, that the rank has reached. If a call of the rank had failed before
    /// because another rank was lost, `round` is the number of that other rank plus one, and
    /// `group` is the reason of its loss.
    Lost,
    /// To a rank that has announced that it leaves: rank 0 sends no further frame.
    Bye,
    /// To rank 0, then to all: the ranks of a group made different calls. The body holds the
    /// mismatch.
    Broken,
    /// To rank 0: the sender stops waiting for this round. The body holds the time it waited, in
    /// nanoseconds, and the world ranks of the group.
    GiveUp,
    /// To rank 0, then to all: a rank of the group has waited `round` nanoseconds for the world
    /// ranks in the body.
    Late,
    /// From rank `from` to rank `to`: asks how many steps of a work `to` has reached. `group` is
    /// the id of the work.
    Ask,
    /// The answer to `Ask`: `round` is the number of steps.
    Answer,
    /// To rank 0: rank `from` waits for a message from rank `to`, and has received `round` earlier
    /// messages from `to` in this group. The body holds the group ranks of both and, as text, the
    /// call that waits.
    Waiting,
}

impl Kind {
    const ALL: [Self; 11] = [
        Self::Input,
        Self::Inputs,
        Self::Message,
        Self::Lost,
        Self::Bye,
        Self::Broken,
        Self::GiveUp,
        Self::Late,
        Self::Ask,
        Self::Answer,
        Self::Waiting,
    ];
}

/// The bytes of a body, and their hash. Frames to several ranks share them. `Debug` shows only
/// their number, because they may be a tensor's.
#[derive(Clone, Default)]
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

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Body({} bytes)", self.len())
    }
}

impl Deref for Body {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0.0
    }
}

/// An HMAC-SHA-256 that has absorbed its key and the first bytes of its message.
pub(crate) type Keyed = Hmac<Sha256>;

/// Numbers and authenticates the frames of one direction of a connection.
#[derive(Debug)]
pub(super) struct Seal {
    /// None over TLS.
    mac: Option<Keyed>,
    frames: u64,
}

impl Seal {
    /// The frames that rank `from` sends. `nonces` is an HMAC with the token as key, and has
    /// absorbed the nonces of both ranks; none over TLS.
    pub(super) fn new(nonces: Option<&Keyed>, from: usize) -> Self {
        let mac = nonces.map(|nonces| nonces.clone().chain_update((from as u64).to_le_bytes()));
        Self { mac, frames: 0 }
    }

    /// The HMAC of the next frame; none over TLS.
    fn next(&mut self, head: &[u8], body: &Body) -> Option<Keyed> {
        let number = self.frames.to_le_bytes();
        self.frames += 1;
        Some(self.mac.clone()?.chain_update(number).chain_update(head).chain_update(body.digest()))
    }
}

/// One frame.
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
        let mut head: Vec<u8> = head.iter().flat_map(|number| number.to_le_bytes()).collect();
        if let Some(tag) = seal.next(&head, &self.body) {
            head.extend(&tag.finalize().into_bytes()[..TAG_BYTES]);
        }
        // Writes a short frame with one call, so that it can travel in one packet.
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
        let mut tag = [0; TAG_BYTES];
        if seal.mac.is_some() {
            from.read_exact(&mut tag)?;
        }
        let numbers = Numbers(&head).collect::<Vec<_>>();
        if numbers[5] > MAX_BODY {
            return Err(bad("the body of a frame is too long"));
        }
        let mut body = Vec::new();
        // Does not allocate the announced length at once: memory grows as the bytes arrive.
        if from.take(numbers[5]).read_to_end(&mut body)? as u64 != numbers[5] {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let body = body.into();
        // The comparison takes constant time, so that it leaks no prefix of the tag.
        if seal.next(&head, &body).is_some_and(|mac| mac.verify_truncated_left(&tag).is_err()) {
            return Err(bad(
                "a frame failed its authentication: it was changed, repeated, dropped or reordered",
            ));
        }
        let kind = Kind::ALL.into_iter().find(|kind| *kind as u64 == numbers[0]);
        let kind = kind.ok_or_else(|| bad("a frame has an unknown kind"))?;
        Ok(Self {
            kind,
            group: numbers[1],
            round: numbers[2],
            from: numbers[3] as usize,
            to: numbers[4] as usize,
            body,
        })
    }
}

/// Reads consecutive u64, little endian.
pub(super) struct Numbers<'a>(pub(super) &'a [u8]);

impl Iterator for Numbers<'_> {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*bytes))
    }
}

/// Encodes consecutive u64: see [`Numbers`].
pub(super) fn from_numbers(numbers: impl IntoIterator<Item = u64>) -> Vec<u8> {
    numbers.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Consecutive byte strings, each preceded by its length as a u64.
#[derive(Default)]
pub(super) struct Strings(pub(super) Vec<u8>);

impl Strings {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend((bytes.len() as u64).to_le_bytes());
        self.0.extend(bytes);
    }

    /// Splits `bytes` into the next string and the rest.
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
    let number = |at: usize| Some(Numbers(strings.get(at)?).next()? as usize);
    let text = |at: usize| Some(String::from_utf8_lossy(strings.get(at)?).into_owned());
    Some(Mismatch { left_rank: number(0)?, right_rank: number(1)?, left: text(2)?, right: text(3)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hmac::KeyInit;

    fn keyed(text: &[u8]) -> Keyed {
        Keyed::new_from_slice(text).unwrap()
    }

    fn written() -> Vec<Vec<u8>> {
        let mut seal = Seal::new(Some(&keyed(b"token")), 1);
        let frame = |body: &[u8]| Frame::new(Kind::Message, 1 << 63, 5, (3, 4), body.to_vec());
        let frames = [frame(b""), frame(b"words"), frame(&vec![7; 1 << 17])];
        let bytes = frames.map(|frame| {
            let mut to = Vec::new();
            frame.write(&mut to, &mut seal).unwrap();
            to
        });
        bytes.into()
    }

    /// Returns how many frames are read before an error.
    fn read(frames: &[Vec<u8>], seal: &mut Seal) -> usize {
        let bytes = frames.concat();
        let mut from = &bytes[..];
        (0..frames.len()).take_while(|_| Frame::read(&mut from, seal).is_ok()).count()
    }

    #[test]
    fn frames_are_read_as_they_were_written() {
        let (frames, mut seal) = (written().concat(), Seal::new(Some(&keyed(b"token")), 1));
        let mut from = &frames[..];
        for len in [0, 5, 1 << 17] {
            let frame = Frame::read(&mut from, &mut seal).unwrap();
            assert_eq!((frame.kind, frame.group, frame.round), (Kind::Message, 1 << 63, 5));
            assert_eq!((frame.from, frame.to, frame.body.len()), (3, 4, len));
        }
        assert!(from.is_empty());
    }

    #[test]
    fn frames_that_were_changed_repeated_or_left_out_are_refused() {
        let frames = written();
        let seal = || Seal::new(Some(&keyed(b"token")), 1);
        for byte in 0..frames[1].len() {
            let mut changed = frames.clone();
            changed[1][byte] ^= 16;
            assert_eq!(read(&changed, &mut seal()), 1, "byte {byte}");
        }
        let order = |order: &[usize]| order.iter().map(|&at| frames[at].clone()).collect::<Vec<_>>();
        assert_eq!(read(&order(&[0, 0, 1]), &mut seal()), 1);
        assert_eq!(read(&order(&[0, 2]), &mut seal()), 1);
        assert_eq!(read(&order(&[1, 0]), &mut seal()), 0);
        // Reads the frames first with a wrong token or wrong nonces, then as frames of the other
        // rank.
        assert_eq!(read(&frames, &mut Seal::new(Some(&keyed(b"guess")), 1)), 0);
        assert_eq!(read(&frames, &mut Seal::new(Some(&keyed(b"token")), 0)), 0);
    }

    /// Over TLS only members send frames, but a member may be wrong: any bytes are a frame or an
    /// error.
    #[test]
    fn bytes_that_are_no_frames_are_errors() {
        let mut random = 7_u64;
        let mut next = move || {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            random >> 33
        };
        let (mut whole, mut read) = (Vec::new(), 0);
        Frame::new(Kind::Inputs, 1, 2, (0, 1), vec![7; 100])
            .write(&mut whole, &mut Seal::new(None, 0))
            .unwrap();
        assert_eq!(whole.len(), 148);
        for _ in 0..20_000 {
            let mut bytes = whole.clone();
            for _ in 0..next() % 4 {
                let at = next() as usize % bytes.len();
                bytes[at] = next() as u8;
            }
            bytes.truncate(bytes.len() - (next() % 3 * (next() % 50)) as usize);
            if let Ok(frame) = Frame::read(&mut &bytes[..], &mut Seal::new(None, 0)) {
                read += 1;
                let _ = (Strings::all(&frame.body), to_mismatch(&frame.body), to_loss(frame.to));
            }
        }
        assert!((1000..19_000).contains(&read), "{read} frames were read");
    }
}

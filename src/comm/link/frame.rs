//! What is said on a connection.

use crate::error::{Loss, Mismatch};
use std::io::{self, Read, Write};

/// No frame is longer: the link is not for bulk data.
const LONGEST: u64 = 1 << 28;

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// To the first rank: rank `from` of `to` ranks gives its part of a round.
    Part = 1,
    /// To a rank: all parts of a round.
    Parts,
    /// From one rank to another.
    Letter,
    /// Rank `from` was lost, how: `to`. The body says how many rounds of which group it took part in, and steps beside it. If it
    /// had been told of a loss before, `round` is the rank that was lost then and one, and `group` how.
    Lost,
    /// To a rank that said that it leaves: nothing more will be sent.
    Bye,
    /// The ranks of a group disagree.
    Broken,
    /// To the first rank: who has not come to this round?
    Who,
    /// The ranks that have not come.
    Absent,
    /// To all: a rank of the group has waited for others for too long.
    Late,
    /// From rank `from` to rank `to`: how many steps of this work has it come to?
    Ask,
    /// The answer: `round`.
    Answer,
}

/// One message.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    pub(super) group: u64,
    pub(super) round: u64,
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) body: Vec<u8>,
}

impl Frame {
    pub(super) fn new(kind: Kind, group: u64, round: u64, (from, to): (usize, usize), body: Vec<u8>) -> Self {
        Self { kind, group, round, from, to, body }
    }

    /// One write, so that frames of several threads do not mix under one lock.
    pub(super) fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let head = [
            self.kind as u64,
            self.group,
            self.round,
            self.from as u64,
            self.to as u64,
            self.body.len() as u64,
        ];
        let mut bytes: Vec<u8> = head.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(&self.body);
        to.write_all(&bytes)
    }

    pub(super) fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut head = [0; 48];
        from.read_exact(&mut head)?;
        let words = Words(&head).collect::<Vec<_>>();
        let kind = match words[0] {
            1 => Kind::Part,
            2 => Kind::Parts,
            3 => Kind::Letter,
            4 => Kind::Lost,
            5 => Kind::Bye,
            6 => Kind::Broken,
            7 => Kind::Who,
            8 => Kind::Absent,
            9 => Kind::Late,
            10 => Kind::Ask,
            11 => Kind::Answer,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame of no known kind")),
        };
        if words[5] > LONGEST {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame that is too long"));
        }
        let mut body = Vec::new();
        // Memory grows as the bytes come.
        if from.take(words[5]).read_to_end(&mut body)? as u64 != words[5] {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self::new(kind, words[1], words[2], (words[3] as usize, words[4] as usize), body))
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

pub(super) fn from_loss(loss: Loss) -> usize {
    match loss {
        Loss::Left => 0,
        Loss::Failed => 1,
        Loss::Panicked => 2,
        Loss::Disconnected => 3,
    }
}

pub(super) fn to_loss(code: usize) -> Loss {
    [Loss::Left, Loss::Failed, Loss::Panicked].get(code).copied().unwrap_or(Loss::Disconnected)
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

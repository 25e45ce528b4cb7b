//! Collectives: exact results, disagreement, lost ranks.

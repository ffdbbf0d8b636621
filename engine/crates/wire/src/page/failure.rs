//! Why a request failed.

use alloc::string::String;

/// The answer to a request that failed, or with id 0 the last frame before the server closes the connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageFailed {
    /// Of which request; 0: the connection itself.
    pub id: u64,
    /// For programs.
    pub code: PageErrorCode,
    /// For people: relation, block, LSN and cause.
    pub text: String,
}

/// Causes of a [`PageFailed`]. The number is the one on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PageErrorCode {
    /// The server has not ingested up to the position that was asked for, and its patience is over. Ask again.
    NotYetThere,
    /// The position is before the horizon: its history is gone.
    BelowHorizon,
    /// The server does not own the keys (any more): the reader's shard map is old.
    WrongShardOwner,
    /// The writer's term is over: final.
    StaleTerm,
    /// A record could not be applied to this page.
    Poisoned,
    /// A layer that the page needs is missing or damaged; the text names it.
    LayerLost,
    /// Too much to do at the moment. Ask again.
    Busy,
    /// A request that breaks the protocol's rules.
    BadRequest,
    /// A fault of the server; its log says more.
    Internal,
    /// The process is stopping. Ask again, there or elsewhere.
    Stopping,
    /// The relation, or a block of it, does not exist at that position.
    NoSuchBlock,
    /// Other protocol version.
    WrongVersion,
    /// No such log here, or of another PostgreSQL cluster.
    UnknownLog,
    /// The certificate or the role does not allow this.
    NotAllowed,
    /// A code of a later version.
    Other(u16),
}

impl PageErrorCode {
    /// Every code of this version.
    pub const KNOWN: [(u16, PageErrorCode); 14] = [
        (1, PageErrorCode::NotYetThere),
        (2, PageErrorCode::BelowHorizon),
        (3, PageErrorCode::WrongShardOwner),
        (4, PageErrorCode::StaleTerm),
        (5, PageErrorCode::Poisoned),
        (6, PageErrorCode::LayerLost),
        (7, PageErrorCode::Busy),
        (8, PageErrorCode::BadRequest),
        (9, PageErrorCode::Internal),
        (10, PageErrorCode::Stopping),
        (11, PageErrorCode::NoSuchBlock),
        (12, PageErrorCode::WrongVersion),
        (13, PageErrorCode::UnknownLog),
        (14, PageErrorCode::NotAllowed),
    ];

    pub(super) fn number(self) -> u16 {
        if let PageErrorCode::Other(number) = self {
            return number;
        }
        Self::KNOWN.iter().find(|(_, known)| *known == self).map_or(0, |(number, _)| *number)
    }

    pub(super) fn from_number(number: u16) -> Self {
        Self::KNOWN.iter().find(|(known, _)| *known == number).map_or(PageErrorCode::Other(number), |(_, code)| *code)
    }
}

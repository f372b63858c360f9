//! Every way in which the core can fail, each as one sentence that names the culprit and the remedy.

use std::path::PathBuf;

pub type Result<T> = std::result::Result<T, Error>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{array}` must have shape {expected}, but has shape {found}")]
    Shape { array: &'static str, expected: String, found: String },

    #[error("`{argument}` must be {requirement}, but is {value}")]
    Argument { argument: &'static str, requirement: String, value: String },

    #[error("`k` = {clusters} clusters need at least as many points, but there are {points}; lower `k`")]
    TooManyClusters { clusters: usize, points: usize },

    #[error("`{array}` row {row} holds a NaN or infinite value, {value} in column {column}; remove that row first")]
    NonFiniteRow { array: &'static str, row: usize, column: usize, value: f64 },

    #[error("`{array}` holds {value} at index {index}; remove that entry first")]
    NotFinite { array: &'static str, index: usize, value: f64 },

    #[error("`{array}` must be finite and not negative, but is {value} at index {index}")]
    Weight { array: &'static str, index: usize, value: f64 },

    /// A point is a row of `array`, as in those that follow.
    #[error("point {point} is too long for float32; scale the rows or coefficients down")]
    Overflow { array: &'static str, point: usize },

    #[error("point {point} has zero length and so no direction; remove it, or use metric=\"euclidean\"")]
    ZeroPoint { array: &'static str, point: usize },

    #[error(
        "point {point} is too short for float32 to bring it to unit length; scale the rows up, or use \
         metric=\"euclidean\""
    )]
    TooShort { array: &'static str, point: usize },

    #[error("`{array}` must be free of zero rows with metric=\"cosine\", but is zero in row {row}")]
    ZeroRow { array: &'static str, row: usize },

    #[error("`{array}` must be a direction, but is zero")]
    ZeroVector { array: &'static str },

    #[error("point {point} changed while it was worked on; let nothing write to `rows` meanwhile")]
    Changed { point: usize },

    #[error("`pairs` row {pair} refers to row {row}, but `rows` has {rows} rows; every index must be in 0..{rows}")]
    RowOutOfRange { pair: usize, row: i64, rows: usize },

    #[error("`{array}` holds cluster {label} at index {index}; it must be in 0..{clusters}")]
    ClusterOutOfRange { array: &'static str, index: usize, label: i64, clusters: usize },

    #[error(
        "`budget` = {budget} pairs cannot give each of the {prompts} prompts its best pair; \
         raise the budget to at least {prompts} or keep fewer prompts"
    )]
    BudgetBelowPrompts { budget: usize, prompts: usize },

    /// What the memory is for ends with what to do, see [`crate::memory`].
    #[error("{bytes} bytes of memory cannot be had for {what}")]
    Memory { bytes: usize, what: &'static str },

    #[error("a matrix is not positive definite to float64 precision; raise `regularization` or scale the pairs down")]
    NotDefinite,

    #[error("{message}; this is a fault of bpo, please report it with the call that led to it")]
    Fault { message: String },

    #[error("cancelled")]
    Cancelled,

    /// It says why by itself.
    #[error("another process that shares the points failed")]
    Elsewhere,

    #[error("{path}: {source}{}", doing.as_ref().map(|doing| format!(" while {doing}")).unwrap_or_default())]
    Io { path: PathBuf, doing: Option<String>, source: std::io::Error },

    #[error("{path}: {reason}")]
    StoreFormat { path: PathBuf, reason: String },

    #[error("{path}: the store has format version {found}, but this release of bpo reads version {known}; {remedy}")]
    StoreVersion { path: PathBuf, found: String, known: u32, remedy: &'static str },

    #[error(
        "{path}: {damage}; `bpo store verify` says how much of the store is sound, `bpo store repair` goes on with it"
    )]
    StoreDamaged { path: PathBuf, damage: String },

    #[error("{path}: another process is writing to this store; wait for it to finish, or choose another directory")]
    StoreLocked { path: PathBuf },

    #[error("{path}: the writer of this store is closed; open the store anew to go on")]
    StoreClosed { path: PathBuf },
}

impl Error {
    /// An argument that is out of its range.
    pub fn argument(argument: &'static str, requirement: impl Into<String>, value: impl ToString) -> Self {
        Self::Argument { argument, requirement: requirement.into(), value: value.to_string() }
    }

    /// An array whose shape does not fit the others.
    pub fn shape(array: &'static str, expected: impl Into<String>, found: impl Into<String>) -> Self {
        Self::Shape { array, expected: expected.into(), found: found.into() }
    }
}

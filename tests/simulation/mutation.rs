/// A mistake in the protocol, made on purpose, to see that the simulation notices. The state machines stay as they are;
/// what goes in or comes out of them is altered the way the mistake would alter it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// Any word in a slot counts for its present loan.
    EpochUnchecked,
    /// A loan that timed out is taken for released: its pages are free at once.
    FreedAtTimeout,
    /// The writer puts the word before what is left of the data.
    WordBeforeData,
    /// A second claim of a granted handoff is granted too.
    DoubleGrant,
    /// A job is acked when it is delivered.
    EarlyAck,
    /// A prefill worker says "released" while its writer is still at it.
    ReleasedWhileWriting,
    /// A loan that its holder has given back stays in the receiver's record.
    GivenBackAndKept,
    /// A prefill worker says that it moves, whether it does or not.
    AlwaysMoving,
    /// A closed session is taken for a fenced one.
    ClosedIsFenced,
    /// Over RDMA, the word is posted while its data is under way.
    WordUnacknowledged,
    /// A fence over RDMA leaves the queue pair as it is.
    NotRefused,
    /// A lost lease is taken for death.
    LeaseLossIsDeath,
}

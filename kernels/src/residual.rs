use crate::Backend;

/// The weight of an RMS norm (Zhang and Sennrich 2019).
#[derive(Debug)]
pub struct RmsNorm<'a, V> {
    /// `[hidden]`.
    pub weight: &'a V,
    /// Added to the mean square.
    pub eps: f32,
}

/// A product's weight, and what is added to each of its rows.
#[derive(Debug)]
pub struct Projection<'a, L, V> {
    /// `[out, in]`.
    pub weight: &'a L,
    /// `[out]`.
    pub bias: Option<&'a V>,
}

/// The residual stream of a decoder, `[tokens, hidden]`: a sum, and perhaps what is still to be added to it.
///
/// Where the addition is cheapest differs: at the end of the product that makes the addend, if that is the only thing
/// left to do with it, or together with the norm that reads the sum next. [`Backend::add_linear`] and
/// [`Backend::norm`] agree on it here, and a model need not know.
#[derive(Debug)]
pub struct Residual<A> {
    pub(crate) sum: A,
    pub(crate) delta: A,
    /// Whether `delta` is still to be added.
    pub(crate) is_owed: bool,
    pub(crate) normed: A,
}

impl<A> Residual<A> {
    /// A stream of up to `rows_max` tokens, holding none yet.
    pub fn new<B: Backend<Activations = A>>(backend: &mut B, rows_max: usize, hidden: usize) -> Self {
        let mut buffer = || backend.activations(rows_max, hidden);
        Self { sum: buffer(), delta: buffer(), normed: buffer(), is_owed: false }
    }

    /// Where the first summand, an embedding, is written: everything before is forgotten.
    pub fn start(&mut self) -> &mut A {
        self.is_owed = false;
        &mut self.sum
    }

    /// The sum after the last [`Backend::norm`], normed.
    pub fn normed(&self) -> &A {
        &self.normed
    }

    /// Where the next summand is written; it is owed then.
    pub(crate) fn delta(&mut self) -> &mut A {
        assert!(!self.is_owed, "a norm follows each summand");
        self.is_owed = true;
        &mut self.delta
    }
}

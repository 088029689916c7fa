//! From a batch to what the kernels are told of it: a pure function.

use std::ops::{Range, RangeInclusive};

use crate::{Batch, KvLayout, SequenceSpan};

/// Keys a block of the attention kernel takes at a time (`kernels/cuda/attention.cu`).
pub(super) const PARTITION: usize = 128;
/// Partitions of a step whose results are kept until they are merged: for each that the cache holds so many, as
/// sequences may share pages. With 36 layers and four query heads a key/value head, that takes a 300th of what a cache
/// of sixteen bits takes.
const SLOTS_A_PARTITION: usize = 4;
/// And at least and at most so many.
const SLOTS: RangeInclusive<usize> = 2048..=16_384;
/// Rows of a prompt that a block of `kernels/cuda/prefill_attention.cu` takes at most.
const TILE_ROWS: usize = 128;
/// Largest step that is recorded.
pub(super) const RECORDED_ROWS_MAX: usize = 256;
/// An item of attention's work that is none: row, partitions from and to, slot.
const NO_WORK: [i32; 4] = [-1, -1, -1, 0];

/// The rows that are computed for `rows` of them: steps of nearly the same size are computed alike, so that one
/// recording serves them all. Rows that nobody asked for are computed from what lies in the buffers, and not looked at.
pub(super) fn bucket(rows: usize) -> usize {
    match rows {
        0..=16 => rows.next_power_of_two(),
        17..=RECORDED_ROWS_MAX => rows.next_multiple_of(16),
        _ => rows,
    }
}

/// Partitions of the keys up to a position.
fn partitions_of(position: u32) -> usize {
    position as usize / PARTITION + 1
}

fn decodes(batch: &Batch) -> bool {
    batch.sequences.iter().all(|sequence| sequence.query_len == 1)
}

/// What makes two steps enqueue the same work: the same kernels in the same grids on the same addresses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// Rows, those nobody asked for included.
    pub(super) rows: usize,
    /// Items of attention's work, those that are no work included: first those of sequences that decode,
    pub(super) decode_items: usize,
    /// then the rows of prompts, which `tiles` has too.
    pub(super) items: usize,
    /// Tiles of prompts: whether they or the rows are computed is for the backend to say.
    pub(super) tiles: usize,
}

/// Everything the kernels are told of a step, as one array of C `int`s that is sent to the device in one copy.
/// Where its parts start depends on the shape alone.
#[derive(Debug, Default)]
pub(super) struct Plan {
    words: Vec<i32>,
    /// All sequences compute a single token.
    decodes: bool,
    shape: Shape,
    tokens: usize,
    position_max: u32,
    /// Items of attention's work that fill the device; 0 if nobody has said.
    items_wanted: usize,
    /// Partitions that the cache holds; 0 if nobody has said.
    partitions: usize,
}

impl Plan {
    /// From now on, cuts attention's work into no more items than about so many: a longer row is then several blocks'
    /// work, but what each leaves for the merge is not free.
    pub(super) fn aim_at(&mut self, items: usize) {
        self.items_wanted = items;
    }

    /// From now on, steps read from such a cache.
    pub(super) fn read_from(&mut self, layout: &KvLayout) {
        self.partitions = layout.blocks * layout.block_size / PARTITION;
    }

    /// Partitions of a step whose results are kept at most, until they are merged.
    pub(super) fn slots(&self) -> usize {
        (SLOTS_A_PARTITION * self.partitions).clamp(*SLOTS.start(), *SLOTS.end())
    }

    pub(super) fn shape(&self) -> Shape {
        self.shape
    }

    /// Tokens somebody asked for.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Furthest position of a token.
    pub(super) fn position_max(&self) -> u32 {
        self.position_max
    }

    /// Whether all sequences compute a single token, so that no row reads what another writes.
    pub(super) fn decodes(&self) -> bool {
        self.decodes
    }

    /// Whether it pays to record such a step: the shapes of decoding come again and again.
    pub(super) fn is_recordable(&self) -> bool {
        self.decodes && (1..=RECORDED_ROWS_MAX).contains(&self.tokens)
    }

    pub(super) fn words(&self) -> &[i32] {
        &self.words
    }

    /// Refills the plan.
    pub(super) fn set(&mut self, batch: &Batch) {
        let as_int = |&x: &u32| x as i32;
        let slots_max = self.slots();
        let Self { words, .. } = self;
        self.tokens = batch.tokens.len();
        self.position_max = batch.positions.iter().copied().max().unwrap_or(0);
        self.decodes = decodes(batch);
        let rows = bucket(self.tokens);
        words.clear();
        words.extend(batch.tokens.iter().map(as_int));
        words.resize(rows, 0);
        words.extend(batch.positions.iter().map(as_int));
        words.resize(2 * rows, -1);
        for sequence in &batch.sequences {
            words.extend((0..sequence.query_len).map(|_| sequence.table_start as i32));
        }
        words.resize(3 * rows, 0);

        // A decoding row is cut into runs of partitions, of the length that makes enough of them; a prompt has rows
        // enough.
        let is_decode = |sequence: &&SequenceSpan| sequence.query_len == 1;
        let decoding = || batch.sequences.iter().filter(is_decode);
        let all: usize = decoding().map(|sequence| partitions_of(sequence.context_len - 1)).sum();
        let run = if self.items_wanted == 0 { 1 } else { all.div_ceil(self.items_wanted).max(1) };
        let mut slots = 0;
        for sequence in decoding() {
            let partitions = partitions_of(sequence.context_len - 1);
            if partitions > run && slots + partitions <= slots_max {
                for begin in (0..partitions).step_by(run) {
                    let end = partitions.min(begin + run);
                    words.extend([sequence.query_start as i32, begin as i32, end as i32, (slots + begin) as i32]);
                }
                slots += partitions;
            } else {
                words.extend([sequence.query_start as i32, 0, partitions as i32, -1]);
            }
        }
        let work = (words.len() - 3 * rows) / 4;
        let decode_items = if self.decodes { work.next_power_of_two() } else { work };
        words.extend((work..decode_items).flat_map(|_| NO_WORK));
        let prompts = || batch.sequences.iter().filter(|sequence| !is_decode(sequence));
        let rows_of = |sequence: &SequenceSpan| sequence.query_start..sequence.query_start + sequence.query_len;
        for prompt in prompts() {
            let partitions = |row: u32| partitions_of(batch.positions[row as usize]) as i32;
            words.extend(rows_of(prompt).flat_map(|row| [row as i32, 0, partitions(row), -1]));
        }
        let items = (words.len() - 3 * rows) / 4;
        for prompt in prompts() {
            // The last come first: they have the longest contexts.
            let rows = rows_of(prompt);
            let tile = |row: u32| [row as i32, (rows.end - row).min(TILE_ROWS as u32) as i32];
            words.extend(rows.clone().step_by(TILE_ROWS).rev().flat_map(tile));
        }
        let tiles = (words.len() - 3 * rows - 4 * items) / 2;
        words.extend(batch.block_tables.iter().map(as_int));
        self.shape = Shape { rows, decode_items, items, tiles };
    }
}

/// Steps before there are any.
impl Plan {
    /// All shapes that steps can have that decode as many sequences as `batch` does, or a few less that make the same
    /// bucket, with contexts as long as its longest at most. Of a batch that does not decode, one for which each kernel
    /// has something to do.
    pub(super) fn shapes_like(&self, batch: &Batch) -> Vec<Shape> {
        let tokens = batch.tokens.len();
        let rows = bucket(tokens);
        if !decodes(batch) {
            return vec![Shape { rows, decode_items: 1, items: 2, tiles: 1 }];
        }
        let context = batch.sequences.iter().map(|sequence| sequence.context_len).max().unwrap_or(1);
        let all = tokens * partitions_of(context - 1);
        let most = match self.items_wanted {
            0 => all.min(self.slots() + tokens),
            // Runs are as long as it takes for there to be that many of them, but each row's last may be shorter.
            wanted => all.min(wanted + tokens - 1),
        };
        let fewest = (1..=tokens).find(|&fewer| bucket(fewer) == rows).unwrap_or(tokens);
        let doubled = std::iter::successors(Some(fewest.next_power_of_two()), |items| Some(2 * items));
        let shape = |items| Shape { rows, decode_items: items, items, tiles: 0 };
        doubled.take_while(|&items| items <= most.next_power_of_two()).map(shape).collect()
    }

    /// Makes this the plan of a step of this shape, as large as `batch`, of which nobody asks for anything: no row has
    /// a position, no item is work.
    pub(super) fn blank(&mut self, batch: &Batch, shape: Shape) {
        let Self { words, .. } = self;
        words.clear();
        words.resize(shape.rows, 0);
        words.resize(2 * shape.rows, -1);
        words.resize(3 * shape.rows, 0);
        words.extend((0..shape.items).flat_map(|_| NO_WORK));
        words.resize(words.len() + 2 * shape.tiles, 0);
        // A block table of one page, of which nothing is read.
        words.push(0);
        (self.tokens, self.position_max, self.decodes, self.shape) = (batch.tokens.len(), 0, decodes(batch), shape);
    }

    /// Words that no plan exceeds of as many tokens as `batch` has, with block tables as long as its together.
    pub(super) fn words_max(&self, batch: &Batch) -> usize {
        let tokens = batch.tokens.len();
        // Filled up to a power of two.
        let items = 2 * (tokens + if self.items_wanted == 0 { self.slots() } else { self.items_wanted });
        3 * bucket(tokens).max(tokens) + 4 * items + 2 * tokens + batch.block_tables.len()
    }
}

/// Where the parts of a plan are, in words.
impl Shape {
    pub(super) fn tokens(&self) -> Range<usize> {
        0..self.rows
    }

    pub(super) fn positions(&self) -> usize {
        self.rows
    }

    pub(super) fn table_starts(&self) -> usize {
        2 * self.rows
    }

    pub(super) fn items(&self) -> usize {
        3 * self.rows
    }

    pub(super) fn tiles(&self) -> usize {
        3 * self.rows + 4 * self.items
    }

    pub(super) fn block_tables(&self) -> usize {
        self.tiles() + 2 * self.tiles
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvDType;

    fn plan(batch: &Batch) -> Plan {
        let mut plan = Plan::default();
        plan.set(batch);
        plan
    }

    /// The items of a plan that are work: row, partitions from and to, slot.
    fn items(plan: &Plan) -> Vec<[i32; 4]> {
        let shape = plan.shape();
        let all = plan.words()[shape.items()..shape.tiles()].as_chunks::<4>().0;
        all.iter().filter(|item| item[0] >= 0).copied().collect()
    }

    fn decoding(contexts: &[usize]) -> Batch {
        let mut batch = Batch::default();
        for &context in contexts {
            batch.push(&[5], context as u32 - 1, &[0], 0);
        }
        batch
    }

    #[test]
    fn a_prompt_is_an_item_a_row_and_a_decode_an_item_a_partition() {
        let mut batch = Batch::default();
        batch.push(&[7, 8, 9], 300, &[4, 5, 6], 3);
        batch.push(&[1], 299, &[2, 3, 1], 0);
        let plan = plan(&batch);
        assert!(!plan.is_recordable());
        let expected = [[3, 0, 1, 0], [3, 1, 2, 1], [3, 2, 3, 2], [0, 0, 3, -1], [1, 0, 3, -1], [2, 0, 3, -1]];
        assert_eq!(items(&plan), expected);
        let (shape, words) = (plan.shape(), plan.words());
        assert_eq!((shape.decode_items, shape.items), (3, 6));
        assert_eq!(words[shape.tiles()..shape.block_tables()], [0, 3]);
        assert_eq!(words[shape.tokens()], [7, 8, 9, 1]);
        assert_eq!(words[shape.positions()..][..4], [300, 301, 302, 299]);
        assert_eq!(words[shape.table_starts()..][..4], [0, 0, 0, 3]);
        assert_eq!(words[shape.block_tables()..], [4, 5, 6, 2, 3, 1]);
    }

    #[test]
    fn a_long_prompt_is_cut_into_tiles_that_begin_where_it_does() {
        let mut batch = Batch::default();
        batch.push(&[1], 10, &[0], 0);
        batch.push(&[2; 300], 77, &[1], 1);
        batch.push(&[3; 128], 0, &[2], 0);
        let plan = plan(&batch);
        let shape = plan.shape();
        assert_eq!(shape.tiles, 4);
        let tiles = &plan.words()[shape.tiles()..shape.block_tables()];
        assert_eq!(tiles, [257, 44, 129, 128, 1, 128, 301, 128]);
    }

    #[test]
    fn decodes_of_about_the_same_size_have_one_shape() {
        let shape_of = |contexts: &[u32]| {
            let mut batch = Batch::default();
            for context in contexts {
                batch.push(&[5], context - 1, &vec![0; *context as usize], 0);
            }
            plan(&batch).shape()
        };
        assert_eq!(shape_of(&[100, 60, 1]), shape_of(&[3, 128, 77, 128]));
        assert_eq!(shape_of(&[700, 600, 65]), shape_of(&[800, 900, 1]));
        assert_ne!(shape_of(&[100]), shape_of(&[1000]));
        assert_ne!(shape_of(&[100; 16]), shape_of(&[100; 17]));
    }

    #[test]
    fn rows_that_fill_up_a_step_have_no_position_and_no_work() {
        let mut batch = Batch::default();
        for _ in 0..3 {
            batch.push(&[5], 0, &[9], 0);
        }
        let plan = plan(&batch);
        let shape = plan.shape();
        assert_eq!(shape, Shape { rows: 4, decode_items: 4, items: 4, tiles: 0 });
        assert_eq!(plan.words()[shape.positions()..][..4], [0, 0, 0, -1]);
        assert_eq!(plan.words()[shape.block_tables() - 4], -1);
    }

    #[test]
    fn no_more_runs_are_cut_than_fill_the_device() {
        let mut plan = Plan::default();
        plan.aim_at(4);
        // One row fills it with runs of two partitions, the last of them shorter.
        plan.set(&decoding(&[7 * PARTITION]));
        assert_eq!(items(&plan), [[0, 0, 2, 0], [0, 2, 4, 2], [0, 4, 6, 4], [0, 6, 7, 6]]);
        // Of many rows, those stay whole that are no longer than a run.
        plan.set(&decoding(&[PARTITION, 9 * PARTITION + 1, 2 * PARTITION, 1]));
        let expected = [[0, 0, 1, -1], [1, 0, 4, 0], [1, 4, 8, 4], [1, 8, 10, 8], [2, 0, 2, -1], [3, 0, 1, -1]];
        assert_eq!(items(&plan), expected);
    }

    #[test]
    fn every_step_that_decodes_has_one_of_the_shapes_that_warming_up_records() {
        let mut state = 1u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let mut met = std::collections::HashSet::new();
        for wanted in [0, 1, 8, 66, 264] {
            let mut plan = Plan::default();
            plan.aim_at(wanted);
            for longest in [1, 100, 2000, 40_000] {
                for _ in 0..200 {
                    let sequences = 1 + random(RECORDED_ROWS_MAX).min(random(RECORDED_ROWS_MAX));
                    let of_bucket = decoding(&vec![longest; bucket(sequences)]);
                    let shapes = plan.shapes_like(&of_bucket);
                    // Some of one length, some of any.
                    let any = random(2) == 0;
                    let context = |_| if any { 1 + random(longest) } else { longest };
                    plan.set(&decoding(&(0..sequences).map(context).collect::<Vec<_>>()));
                    assert!(shapes.contains(&plan.shape()), "{:?} is none of {shapes:?}", plan.shape());
                    assert!(plan.words().len() <= plan.words_max(&of_bucket));
                    met.insert(plan.shape());
                }
            }
        }
        assert!(met.len() > 80, "{}", met.len());
    }

    #[test]
    fn no_plan_is_longer_than_is_made_room_for() {
        for wanted in [0, 8, 264] {
            for tokens in [1, 2, 15, 100, 255, 256, 300, 2048] {
                let mut largest = Batch::default();
                largest.push(&vec![0; tokens], 0, &[0; 50], 0);
                let mut plan = Plan::default();
                plan.aim_at(wanted);
                for sequences in [1, 2, 7, 50] {
                    // Decodes, prompts as short as there are, and one of the rest.
                    let mut batch = Batch::default();
                    for i in 0..sequences.min(tokens) {
                        let left = tokens - batch.tokens.len();
                        let len = if i + 1 == sequences { left } else { left.min(1 + i % 2) };
                        batch.push(&vec![0; len], 300_000, &[0], 0);
                        if batch.tokens.len() == tokens {
                            break;
                        }
                    }
                    plan.set(&batch);
                    assert!(plan.words().len() <= plan.words_max(&largest), "{tokens} tokens of {sequences}");
                }
            }
        }
    }

    #[test]
    fn nobody_asks_for_anything_in_a_blank_plan() {
        let mut plan = Plan::default();
        plan.aim_at(8);
        let mut prompt = Batch::default();
        prompt.push(&[5; 100], 0, &[9], 0);
        for batch in [decoding(&[700; 3]), prompt] {
            for shape in plan.shapes_like(&batch) {
                plan.blank(&batch, shape);
                assert_eq!((plan.shape(), plan.tokens(), plan.position_max()), (shape, batch.tokens.len(), 0));
                assert_eq!(plan.is_recordable(), shape.tiles == 0);
                assert!(items(&plan).is_empty());
                let words = plan.words();
                assert!(words[shape.positions()..shape.table_starts()].iter().all(|&position| position == -1));
                assert!(words[shape.tiles()..shape.block_tables()].as_chunks::<2>().0.iter().all(|tile| tile[1] == 0));
                assert_eq!(words[shape.block_tables()..], [0], "{shape:?}");
            }
        }
    }

    #[test]
    fn slots_that_run_out_leave_the_rest_unsplit() {
        let partitions = SLOTS.start() / 2 + 1;
        let plan = plan(&decoding(&[partitions * PARTITION; 2]));
        assert_eq!(items(&plan).len(), partitions + 1);
        assert_eq!(items(&plan).last(), Some(&[1, 0, partitions as i32, -1]));
    }

    #[test]
    fn long_contexts_that_fill_a_cache_are_all_cut() {
        let dtype = KvDType::BF16;
        let layout = KvLayout { layers: 36, kv_heads: 8, head_dim: 128, block_size: 16, blocks: 0, dtype };
        let mut plan = Plan::default();
        for (sequences, context) in [(4, 128 << 10), (1, 1 << 20), (40, 20_000)] {
            plan.read_from(&KvLayout { blocks: sequences * context / layout.block_size, ..layout });
            plan.aim_at(66);
            plan.set(&decoding(&vec![context; sequences]));
            assert!(items(&plan).iter().all(|item| item[3] >= 0), "{sequences} of {context}");
            assert!((60..=66 + sequences).contains(&items(&plan).len()), "{}", items(&plan).len());
        }
        plan.read_from(&KvLayout { blocks: 1 << 30, ..layout });
        assert_eq!(plan.slots(), *SLOTS.end());
    }
}

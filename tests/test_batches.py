"""From text to micro-batches: tokenising, collating, loading, and what accumulation must not change."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from helpers import make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import fit
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sdpo_lightning import DPOLitModule, PreferenceSource
from sdpo_lightning.backbone import load_policy
from sdpo_lightning.data.collate import PaddedCollator, PairTokenizer, TokenizedPair, tokenize_pair
from sdpo_lightning.data.curriculum import steps_per_epoch
from sdpo_lightning.data.loader import PairStore, StageLoader, epoch_order
from sdpo_lightning.logprobs import pair_logps
from sdpo_lightning.losses import dpo_loss
from sdpo_lightning.types import ConfigurationError, PairLogps

FEW = settings(max_examples=100, deadline=None, derandomize=True)
BETA = 0.1

# ---- text -> ids


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def with_own(tokenizer, **attributes):
    """A copy whose special tokens or template differ."""
    own = copy.deepcopy(tokenizer)
    for name, value in attributes.items():
        setattr(own, name, value)
    return own


@pytest.fixture
def words(tiny_tokenizer):
    """Ids of words of the tiny vocabulary."""
    return lambda text: tiny_tokenizer.convert_tokens_to_ids(text.split())


def test_string_row_by_hand(tiny_tokenizer, words):
    pair = PairTokenizer(tiny_tokenizer, 32)("w5 w6", " w1 w2", " w3")
    assert pair == TokenizedPair(words("w5 w6"), words("w1 w2 <eos>"), words("w3 <eos>"))


def test_eos_is_never_doubled(tiny_tokenizer, words):
    pair = PairTokenizer(tiny_tokenizer, 32)("w5", " w1 <eos>", " w3 <eos>")
    assert pair.chosen_ids == words("w1 <eos>")
    assert pair.rejected_ids == words("w3 <eos>")


def test_chat_row_by_hand(tiny_tokenizer, words):
    pair = PairTokenizer(tiny_tokenizer, 32)(user("w5 w6"), assistant("w1"), assistant("w2 w3"))
    assert pair.prompt_ids == words("<start> user w5 w6 <eos> <start> assistant")
    # The template ends the turn itself; nothing is appended.
    assert pair.chosen_ids == words("w1 <eos>")
    assert pair.rejected_ids == words("w2 w3 <eos>")


def test_a_shared_beginning_stays_in_both_completions(tiny_tokenizer, words):
    pair = PairTokenizer(tiny_tokenizer, 32)("w5", " w1 w2", " w1 w3")
    assert (pair.prompt_ids, pair.chosen_ids) == (words("w5"), words("w1 w2 <eos>"))
    assert pair.rejected_ids == words("w1 w3 <eos>")


def test_truncation_cuts_the_end_of_completions(tiny_tokenizer, words):
    pair = PairTokenizer(tiny_tokenizer, 4)("w5 w6", " w1 w2 w3", " w4")
    # 4 tokens in all, 2 of them the prompt's: the EOS of the long side is gone, that of the short one isn't.
    assert pair == TokenizedPair(words("w5 w6"), words("w1 w2"), words("w4 <eos>"))


@pytest.mark.parametrize(
    "row, max_length, reason",
    [
        (("w5 w6 w7", " w1", " w2"), 3, "prompt_too_long"),
        (("w5 w6 w7", " w1", " w2"), 2, "prompt_too_long"),
        ((user("w5"), assistant("w1"), assistant("w2")), 6, "prompt_too_long"),
        (("w5", " w1", " w1"), 32, "identical"),
        (("w5", " w1", " w1 <eos>"), 32, "identical"),
        (("w5", " w1 w2 w3", " w1 w2 w4"), 3, "identical"),
        ((user("w5"), assistant("w1 w2"), assistant("w1 w3")), 7, "identical"),
        (("w5", " w1 <eos> w2", " w3"), 32, "special_token_in_text"),
        (("w5", " w1", " w3 <start>"), 32, "special_token_in_text"),
        (("w5", " w1", " <eos> w3 <eos>"), 32, "special_token_in_text"),
        ((user("w5"), assistant("w1 <eos>"), assistant("w2")), 32, "special_token_in_text"),
        ((user("w5 <start>"), assistant("w1"), assistant("w2")), 32, "special_token_in_text"),
        (("", "w1", "w2"), 32, "empty_completion"),
    ],
)
def test_reasons_to_drop(tiny_tokenizer, row, max_length, reason):
    tokenizer = PairTokenizer(tiny_tokenizer, max_length)
    assert tokenizer(*row) == reason
    assert tokenize_pair(tokenizer, *row) == reason


@pytest.mark.parametrize(
    "row, max_length",
    [
        # One token beyond the prompt is enough.
        (("w5 w6 w7", " w1", " w2"), 4),
        ((user("w5"), assistant("w1"), assistant("w2")), 7),
        # They differ within the limit.
        (("w5", " w1 w2 w3", " w1 w2 w4"), 4),
        # One ends where the other goes on.
        (("w5", " w1", " w1 w2"), 32),
        # An empty answer is an EOS.
        (("w5", "", " w1"), 32),
        # A prompt may hold control tokens: it may be a chat that was rendered before.
        (("<start> user w5 <eos>", " w1", " w2"), 32),
    ],
)
def test_rows_that_stay(tiny_tokenizer, row, max_length):
    pair = PairTokenizer(tiny_tokenizer, max_length)(*row)
    assert isinstance(pair, TokenizedPair)
    assert pair.prompt_ids and pair.chosen_ids and pair.rejected_ids
    assert len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= max_length


def test_pad_as_eos_keeps_eos_scored(tiny_tokenizer):
    tokenizer = with_own(tiny_tokenizer, pad_token="<eos>")
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    tokenize = PairTokenizer(tokenizer, 32)
    pairs = [tokenize("w5", " w1", " w2 w3 w4 w6"), tokenize("w7 w8", " w9", "")]
    batch = PaddedCollator(eos)([0, 1], pairs, [1.0, 1.0], 2)
    # Each of the four completions ends in its own EOS, which is scored; no padding is.
    assert (batch.target_ids == eos).sum() == 4
    assert batch.completion_lengths.tolist() == [2, 2, 5, 1]
    assert batch.attention_mask.sum(1).tolist() == [3, 4, 6, 3]
    assert batch.attention_mask.flatten()[batch.source_index + 1].all()


def test_a_tokenizer_without_eos_is_refused(tiny_tokenizer):
    with pytest.raises(ConfigurationError, match="no EOS.*data.tokenizer"):
        PairTokenizer(with_own(tiny_tokenizer, eos_token=None), 32)


def test_chat_rows_without_a_template_are_refused(tiny_tokenizer):
    tokenizer = PairTokenizer(with_own(tiny_tokenizer, chat_template=None), 32)
    with pytest.raises(ConfigurationError, match="'mine'.*chat template"):
        tokenizer.check_template("mine")
    # String rows need none.
    assert isinstance(tokenizer("w5", " w1", " w2"), TokenizedPair)
    PairTokenizer(tiny_tokenizer, 32).check_template("mine")


@pytest.mark.parametrize("max_length", [1, 0, -3])
def test_a_length_without_room_for_a_completion_is_refused(tiny_tokenizer, max_length):
    with pytest.raises(ConfigurationError, match="data.max_length"):
        PairTokenizer(tiny_tokenizer, max_length)


# ---- agreement with TRL


@pytest.fixture(scope="module")
def merging_tokenizer(tiny_tokenizer) -> PreTrainedTokenizerFast:
    """A byte-level BPE with BOS, whose tokens merge across the end of a prompt."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "</s>", "<pad>"]
    corpus = ["the cat sat on the mat", "another cat, another hat: understand?"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=340, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    bpe.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    wrapped.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return wrapped


def by_trl_rules(tokenizer, prompt, chosen, rejected, max_length):
    """TRL 1.16's `DPOTrainer`: EOS, joint tokenising, common prefix, drop; its collator cuts the end."""
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        chosen, rejected = (side if side.endswith(eos) else side + eos for side in (chosen, rejected))
        prompt_ids = tokenizer(text=prompt)["input_ids"]
        sides = [tokenizer(text=prompt + side)["input_ids"] for side in (chosen, rejected)]
    else:

        def render(messages, **arguments):
            rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)
            return rendered["input_ids"]

        prompt_ids = render(prompt, add_generation_prompt=True)
        sides = [render(prompt + side) for side in (chosen, rejected)]
    length = len(prompt_ids)
    for side in sides:
        while prompt_ids[:length] != side[:length]:
            length -= 1
    if length >= max_length:
        return None
    return TokenizedPair(prompt_ids[:length], sides[0][length:max_length], sides[1][length:max_length])


ROWS = [
    ("the cat ", "sat", "hat"),
    ("the cat", " sat on the mat", " understand?"),
    # "anoth" + "er" becomes one token, so the prompt alone isn't a prefix.
    ("the anoth", "er cat", "er hat"),
    # Only one side merges: both start at the same place.
    ("under", "stand the cat", ", the mat"),
    ("under", ", the mat", "stand the cat"),
    ("the cat sat on the mat", "", " the</s>"),
    ("caf\u00e9 \u732b", "\u2026 yes\n", "\tno"),
]


@pytest.mark.parametrize("max_length", [64, 11, 4])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_ids_agree_with_trl(merging_tokenizer, row, chat, max_length):
    if chat:
        row = user(row[0]), assistant(row[1]), assistant(row[2].removesuffix("</s>"))
    expected = by_trl_rules(merging_tokenizer, *row, max_length)
    found = PairTokenizer(merging_tokenizer, max_length)(*row)
    if expected is None:
        assert found == "prompt_too_long"
    elif expected.chosen_ids == expected.rejected_ids:
        # TRL trains on such a pair, whose margin is 0 forever.
        assert found == "identical"
    else:
        assert found == expected


def test_rows_above_do_merge(merging_tokenizer):
    prompt_ids = merging_tokenizer("the anoth")["input_ids"]
    pair = PairTokenizer(merging_tokenizer, 64)("the anoth", "er cat", "er hat")
    assert len(pair.prompt_ids) < len(prompt_ids)
    assert merging_tokenizer.decode(pair.prompt_ids + pair.chosen_ids) == "<s>the another cat</s>"


# ---- ids -> batches


def make_pairs(count: int, seed: int = 0) -> list[TokenizedPair]:
    """Random ids of the tiny vocabulary (67 words), lengths 1 to 6."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(1, 7, (), generator=generator))
        return torch.randint(2, 67, (length,), generator=generator).tolist()

    return [TokenizedPair(ids(), ids(), ids()) for _ in range(count)]


def test_collator_layout_by_hand():
    pairs = [TokenizedPair([5, 6], [7], [8, 9, 1]), TokenizedPair([4], [2, 3], [2])]
    batch = PaddedCollator(0)([70, 71], pairs, [1.0, 0.0], 9)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [4, 2, 3, 0, 0], [5, 6, 8, 9, 1], [4, 2, 0, 0, 0]]
    # Real tokens, 3, 3, 5 and 2 of them, come first.
    assert batch.attention_mask.tolist() == [[1] * n + [0] * (5 - n) for n in (3, 3, 5, 2)]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 4
    # Row 0 from position 1; row 1 from 5 + 0; row 2 from 10 + 1; row 3 from 15 + 0.
    assert batch.source_index.tolist() == [1, 5, 6, 11, 12, 13, 15]
    assert batch.target_ids.tolist() == [7, 2, 3, 8, 9, 1, 2]
    assert batch.sequence_index.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert batch.completion_lengths.tolist() == [1, 2, 3, 1]
    assert batch.pair_id.tolist() == [70, 71]
    assert batch.weights.tolist() == [1.0, 0.0]
    assert (batch.step_pairs, batch.num_pairs) == (9, 2)


@FEW
@given(st.integers(1, 6), st.integers(0, 10**6))
def test_source_index_predicts_targets(count, seed):
    pairs = make_pairs(count, seed)
    batch = PaddedCollator(0)(range(count), pairs, [1.0] * count, count)
    assert torch.equal(batch.input_ids.flatten()[batch.source_index + 1], batch.target_ids)
    sides = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    for sequence, completion in enumerate(sides):
        assert batch.target_ids[batch.sequence_index == sequence].tolist() == completion
        assert batch.completion_lengths[sequence] == len(completion)
    # Source and target lie in the row of their sequence.
    length = batch.input_ids.shape[1]
    assert torch.equal(batch.source_index // length, batch.sequence_index)
    assert torch.equal((batch.source_index + 1) // length, batch.sequence_index)


@pytest.fixture(scope="module")
def backbone(tiny_model_dir):
    return load_policy(str(tiny_model_dir)).eval()


def logps_of(backbone, batch) -> PairLogps:
    return pair_logps(backbone(batch), batch)


@torch.no_grad()
def test_batch_mates_never_change_logps(backbone):
    pairs = [*make_pairs(5), TokenizedPair(list(range(2, 30)), list(range(30, 60)), [2] * 40)]
    together = logps_of(backbone, PaddedCollator(0)(range(6), pairs, [1.0] * 6, 6))
    for index, pair in enumerate(pairs):
        alone = logps_of(backbone, PaddedCollator(1)([index], [pair], [1.0], 1))
        for side in ("chosen", "rejected"):
            ours, theirs = getattr(together, side)[index].item(), getattr(alone, side)[0].item()
            assert ours == pytest.approx(theirs, abs=1e-5 * max(1.0, abs(theirs)))


@torch.no_grad()
def test_logps_equal_those_of_the_plain_model(backbone):
    for pair in make_pairs(3, seed=4):
        found = logps_of(backbone, PaddedCollator(0)([0], [pair], [1.0], 1))
        for side, completion in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
            ids = torch.tensor([pair.prompt_ids + completion])
            table = backbone.model(input_ids=ids).logits[0].double().log_softmax(-1)
            start = len(pair.prompt_ids) - 1
            expected = sum(table[start + k, token].item() for k, token in enumerate(completion))
            tolerance = 1e-5 * max(1.0, abs(expected))
            assert getattr(found, side)[0].item() == pytest.approx(expected, abs=tolerance)


# ---- batches of a stage

IDS = [(3 << 40) + 7 * row for row in range(20)]
PAIRS = dict(zip(IDS, make_pairs(20, seed=1), strict=True))


@pytest.fixture(scope="module")
def store() -> PairStore:
    def table(ids):
        columns = {name: [getattr(PAIRS[i], name) for i in ids] for name in vars(PAIRS[IDS[0]])}
        return Dataset.from_dict({"pair_id": ids, **columns})

    # Two data sets, and the ids in no order.
    return PairStore([table(IDS[12:]), table(IDS[11::-1])])


def loaders(store, ids, batch_size, world_size, accumulate, max_batches=None) -> list[StageLoader]:
    return [
        StageLoader(store, PaddedCollator(0), ids, batch_size, rank, world_size, accumulate, max_batches)
        for rank in range(world_size)
    ]


def real_ids(batch) -> list[int]:
    return batch.pair_id[batch.weights > 0].tolist()


def test_store_finds_pairs_in_the_order_asked(store):
    asked = [IDS[13], IDS[2], IDS[19], IDS[2]]
    assert store.get(asked) == [PAIRS[i] for i in asked]
    # The digest is one of the rows in their order, and of nothing else.
    assert store.digest(asked) == store.digest(tuple(asked))
    assert len({store.digest(asked), store.digest(asked[:3]), store.digest(sorted(asked))}) == 3


LAYOUTS = st.tuples(st.integers(1, 17), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))


@FEW
@given(LAYOUTS)
def test_each_pair_exactly_once_over_ranks_and_micro_batches(store, layout):
    pairs, batch_size, world_size, accumulate = layout
    ids = epoch_order(IDS[:pairs], 0, "s", 0)
    split = loaders(store, ids, batch_size, world_size, accumulate)
    ranks = [list(loader) for loader in split]
    count = -(-pairs // (batch_size * world_size))
    assert [len(batches) for batches in ranks] == [len(loader) for loader in split] == [count] * world_size
    # Micro-batch after micro-batch, rank after rank: the order of the pass.
    assert [i for k in range(count) for batches in ranks for i in real_ids(batches[k])] == ids
    for start in range(0, count, accumulate):
        window = [batch for batches in ranks for batch in batches[start : start + accumulate]]
        real = sum(len(real_ids(batch)) for batch in window)
        assert {batch.step_pairs for batch in window} == {real}
        assert real >= 1
        # The weights of a global batch add up to a mean.
        assert sum((batch.weights / batch.step_pairs).sum().item() for batch in window) == pytest.approx(1.0)
    for batches in ranks:
        for batch in batches:
            assert 1 <= batch.num_pairs <= batch_size
            # A filler stands alone, in place of a batch.
            assert batch.weights.tolist() in ([1.0] * batch.num_pairs, [0.0])


def test_uneven_tail_by_hand(store):
    # 7 pairs, 2 a micro-batch, 3 ranks: 6 in the first round, 1 + filler + filler in the second.
    ranks = [list(loader) for loader in loaders(store, IDS[:7], 2, 3, 1)]
    assert [[real_ids(batch) for batch in batches] for batches in ranks] == [
        [IDS[0:2], IDS[6:7]],
        [IDS[2:4], []],
        [IDS[4:6], []],
    ]
    assert [[batch.step_pairs for batch in batches] for batches in ranks] == [[6, 1]] * 3
    assert ranks[1][1].weights.tolist() == ranks[2][1].weights.tolist() == [0.0]
    # With both rounds in one optimizer step it has 7 pairs.
    assert {b.step_pairs for loader in loaders(store, IDS[:7], 2, 3, 2) for b in loader} == {7}


@FEW
@given(LAYOUTS, st.integers(1, 6))
def test_limit_batches_counts_only_what_is_used(store, layout, limit):
    pairs, batch_size, world_size, accumulate = layout
    ranks = loaders(store, IDS[:pairs], batch_size, world_size, accumulate, limit)
    batches, steps = steps_per_epoch(pairs, batch_size * world_size, accumulate, limit)
    used = [list(loader)[:batches] for loader in ranks]
    assert batches == min(len(ranks[0]), limit)
    windows = range(0, batches, accumulate)
    assert len(windows) == steps
    for start in windows:
        window = [batch for taken in used for batch in taken[start : start + accumulate]]
        assert {batch.step_pairs for batch in window} == {sum(len(real_ids(batch)) for batch in window)}


def content(batch):
    names = ("input_ids", "source_index", "target_ids", "pair_id", "weights")
    return [getattr(batch, name) for name in names]


def assert_same_batches(left, right):
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        assert ours.step_pairs == theirs.step_pairs
        for a, b in zip(content(ours), content(theirs), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("world_size, accumulate", [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_resume_at_every_position(store, world_size, accumulate):
    for rank in range(world_size):

        def fresh(rank=rank):
            return loaders(store, IDS[:13], 2, world_size, accumulate)[rank]

        whole = list(fresh())
        for position in range(len(whole) + 1):
            stopped = fresh()
            iterator = iter(stopped)
            taken = [next(iterator) for _ in range(position)]
            assert_same_batches(taken, whole[:position])
            state = stopped.state_dict()
            assert state == {"position": position}
            resumed = fresh()
            resumed.load_state_dict(state)
            assert_same_batches(list(resumed), whole[position:])
            # The pass after a resumed one is a whole one.
            assert_same_batches(list(resumed), whole)


def test_asking_for_an_iterator_takes_nothing(store):
    (loader,) = loaders(store, IDS[:6], 2, 1, 1)
    for _ in range(3):
        iter(loader)
    assert loader.state_dict() == {"position": 0}
    assert [real_ids(batch) for batch in loader] == [IDS[0:2], IDS[2:4], IDS[4:6]]
    assert loader.state_dict() == {"position": 3}


def test_epoch_order_is_a_pure_function():
    ids = IDS[:15]
    order = epoch_order(ids, 1, "stage", 0)
    assert sorted(order) == ids and order != ids
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert epoch_order(ids, 1, "stage", 0) == order
    # It neither reads nor moves the global generator.
    assert torch.equal(torch.get_rng_state(), before)
    others = [epoch_order(ids, *key) for key in ((2, "stage", 0), (1, "other", 0), (1, "stage", 1))]
    assert len({tuple(found) for found in (order, *others)}) == 4
    assert ids == IDS[:15]


class NotesValidation(DPOLitModule):
    """Notes the held-out pairs of each validation."""

    def on_validation_epoch_start(self):
        self.validations = [*getattr(self, "validations", []), []]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.validations[-1] += real_ids(batch)
        return super().validation_step(batch, batch_idx, dataloader_idx)


@pytest.mark.parametrize("limit, held_out", [(1.0, 8), (1, 2)])
def test_every_validation_of_an_epoch_sees_the_same_pairs(tmp_path, tiny_model_dir, limit, held_out):
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(20, 0))
    _, module = fit(
        tmp_path / "run",
        tiny_model_dir,
        [PreferenceSource("rows", str(path))],
        module_class=NotesValidation,
        trainer_args={"val_check_interval": 2, "limit_val_batches": limit},
        val_fraction=0.4,
    )
    # 12 pairs by 2 are 6 batches: validations after 2, 4 and 6; of 8 held-out pairs all, or one batch.
    assert [len(seen) for seen in module.validations] == [held_out] * 3
    assert module.validations[0] == module.validations[1] == module.validations[2]


# ---- accumulation


def reference_logps(pair_id: torch.Tensor) -> PairLogps:
    """Some fixed logps a pair, far enough from the policy's that pairs weigh differently."""
    row = (pair_id - IDS[0]) // 7
    lengths = torch.ones_like(row)
    return PairLogps(-20.0 - row % 3, -20.0 + row % 5, lengths, lengths)


def losses_of(backbone, batch) -> torch.Tensor:
    return dpo_loss(logps_of(backbone, batch), reference_logps(batch.pair_id), BETA)


def gradients(backbone) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in backbone.parameters()]
    backbone.zero_grad()
    return found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("batch_size, accumulate", [(1, 4), (2, 2), (4, 1)])
def test_gradient_of_a_global_batch_doesnt_depend_on_micro_batches(
    backbone, store, batch_size, accumulate, world_size
):
    assert torch.get_default_dtype() == torch.float32
    accumulate = max(1, accumulate // world_size)
    per_step = accumulate * batch_size * world_size
    # One global batch, and the 3 pairs that are left over.
    ids = IDS[: per_step + 3]
    ranks = [list(loader) for loader in loaders(store, ids, batch_size, world_size, accumulate)]
    for first, step in ((0, ids[:per_step]), (accumulate, ids[per_step:])):
        micro_batches = [batch for batches in ranks for batch in batches[first : first + accumulate]]
        for batch in micro_batches:
            ((losses_of(backbone, batch) * batch.weights).sum() / batch.step_pairs).backward()
        found = gradients(backbone)
        whole = PaddedCollator(0)(step, store.get(step), [1.0] * len(step), len(step))
        losses = losses_of(backbone, whole)
        # Neither saturated nor all alike, or the comparison would say little.
        assert losses.max() - losses.min() > 0.1
        losses.mean().backward()
        for ours, theirs in zip(found, gradients(backbone), strict=True):
            scale = max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * scale)

"""Reward models and pair encoders against plain transformers loops, on models made on the spot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from spa_lite.errors import BackendError, ModelError
from spa_lite.judges.reward import PairEncoderJudge, Question, RewardJudge
from spa_lite.opinion import Tick
from spa_lite.records import Completion, Message, Sample
from tests.tiny import SPECIALS, VOCABULARY, make_config, make_tokenizer

torch = pytest.importorskip("torch")

from spa_lite.backends import classifiers  # noqa: E402 - needs torch

MARKS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<|source|>", "<|candidate1|>", "<|candidate2|>"]
ANSWERS = ["the baker", "a heron mends seven plums.", "my sister! " * 6, "é 日本 🙂", "nothing at all"]
ENCODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


def encoder_tokenizer(length: int = 64) -> Any:
    """A tokenizer that puts [CLS] and [SEP] around one text or two, with segments."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    core = make_tokenizer(MARKS, None, None, None).backend_tokenizer
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        additional_special_tokens=MARKS[4:],
        model_max_length=length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save(folder: Path, config: Any, tokenizer: Any, seed: int = 0, **keys: Any) -> str:
    """A random classifier in a folder; `keys` go into its config.json."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if keys:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return str(folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama reward model whose config knows no pad token, as many have none."""
    config = make_config("llama", num_labels=1, pad_token_id=None, initializer_range=0.3)
    return save(tmp_path_factory.mktemp("decoder"), config, make_tokenizer())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT reward model without a chat template."""
    from transformers import BertConfig

    config = BertConfig(**ENCODER, num_labels=1, max_position_embeddings=64)
    return save(tmp_path_factory.mktemp("encoder"), config, encoder_tokenizer())


def conversation(answer: str, question: str = "which engine forgets the bridge?") -> tuple[Message, ...]:
    return Message(role="user", content=question), Message(role="assistant", content=answer)


def plain_rewards(folder: str, texts: Sequence[Sequence[Message]], encode: Callable[[Any, Any], Any]) -> list[float]:
    """One text at a time, as the transformers documentation does it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [float(model(**encode(tokenizer, text)).logits[0, 0]) for text in texts]


def chat(tokenizer: Any, turns: Sequence[Message]) -> Any:
    told = [{"role": turn.role, "content": turn.content} for turn in turns]
    return tokenizer.apply_chat_template(told, tokenize=True, return_dict=True, return_tensors="pt")


def two_texts(tokenizer: Any, turns: Sequence[Message]) -> Any:
    return tokenizer(turns[0].content, turns[1].content, return_tensors="pt")


def test_a_decoder_scores_as_a_plain_loop(decoder: str) -> None:
    """Batched although its config knows no pad token; rewards differ between answers."""
    texts = [conversation(answer) for answer in ANSWERS]
    model, expected = classifiers.load(decoder, "cpu"), plain_rewards(decoder, texts, chat)
    ticks: list[int] = []
    assert model.scores(texts, lambda: ticks.append(1)) == pytest.approx(expected, abs=1e-5)
    assert len(ticks) == len(texts)
    assert max(expected) - min(expected) > 0.01
    assert not model.compares
    asked = [(text[:1], ANSWERS[0], ANSWERS[1]) for text in texts[:1]]
    assert model.comparisons(asked) == pytest.approx([expected[0] - expected[1]], abs=1e-5)


def test_an_encoder_scores_as_a_plain_loop(encoder: str) -> None:
    """Question and answer are two segments."""
    texts = [conversation(answer, "which engine?") for answer in ANSWERS[:2] + ANSWERS[3:]]
    expected = plain_rewards(encoder, texts, two_texts)
    assert classifiers.load(encoder, "cpu").scores(texts) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01


@pytest.mark.parametrize("pad", [0, 2])
def test_a_pad_token_that_is_known_is_kept(tmp_path: Path, pad: int) -> None:
    """Also where it is the end of turn (2), which then never is the token with the reward."""
    config = make_config("llama", num_labels=1, pad_token_id=pad, initializer_range=0.3)
    folder = save(tmp_path, config, make_tokenizer())
    texts = [conversation(answer) for answer in ANSWERS]
    found = classifiers.load(folder, "cpu").scores(texts)
    assert found == pytest.approx(plain_rewards(folder, texts, chat), abs=1e-5)


@pytest.mark.parametrize("which", ["decoder", "encoder"])
def test_a_score_does_not_depend_on_its_batch(which: str, request: pytest.FixtureRequest) -> None:
    model = classifiers.load(request.getfixturevalue(which), "cpu")
    texts = [conversation(answer) for answer in ANSWERS]
    together = model.scores(texts)
    assert together == pytest.approx([model.scores([text])[0] for text in texts], abs=1e-5)
    assert together[::-1] == pytest.approx(model.scores(texts[::-1]), abs=1e-5)


def test_half_the_batch_where_memory_runs_out(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = classifiers.load(decoder, "cpu")
    texts = [conversation(answer) for answer in ANSWERS]
    expected, sizes = model.scores(texts), []
    real = classifiers._Reader._padded

    def tight(self: Any, texts: Any) -> Any:
        sizes.append(len(texts))
        if len(texts) > 2:
            raise RuntimeError("out of memory")
        return real(self, texts)

    monkeypatch.setattr(classifiers._Reader, "_padded", tight)
    assert model.scores(texts) == pytest.approx(expected, abs=1e-5)
    assert sizes == [5, 2, 2, 1]


def test_what_is_too_long_is_cut_and_counted(encoder: str, decoder: str) -> None:
    """The question loses its beginning, the answer nothing: an answer decides as if the question were short."""
    for folder in (encoder, decoder):
        model = classifiers.load(folder, "cpu")
        long = "seven plums " * 200
        cut = model.scores([conversation("a heron", long), conversation("the baker", long)])
        assert model.cut == 2
        assert cut[0] != cut[1]
        assert model.scores([conversation("a heron", "red doors " * 100 + long)])[0] == pytest.approx(cut[0], abs=1e-5)
        model.scores([conversation(long)])  # the answer alone is too long
        assert model.cut == 4
        assert "4 texts" in RewardJudge(model).notes[0]


def test_special_tokens_in_an_answer_are_plain_text(encoder: str, decoder: str) -> None:
    for folder, string in ((encoder, "[SEP]"), (decoder, "<|end|>")):
        model = classifiers.load(folder, "cpu")
        special = model._reader.tokenizer.convert_tokens_to_ids(string)  # type: ignore[attr-defined]
        alone = model._text(conversation("a heron")).ids  # type: ignore[attr-defined]
        within = model._text(conversation(f"a {string} heron")).ids  # type: ignore[attr-defined]
        assert within.count(special) == alone.count(special)
        assert len(within) > len(alone)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path, decoder: str) -> None:
    """Several outputs, a model without a head, pickled weights, no such folder: a sentence each."""
    from transformers import BertConfig

    two = save(tmp_path / "two", BertConfig(**ENCODER, num_labels=2, max_position_embeddings=64), encoder_tokenizer())
    with pytest.raises(ModelError, match=r"2 outputs \(LABEL_0, LABEL_1\)"):
        classifiers.load(two)
    from tests.tiny import make_model

    with pytest.raises(ModelError, match=r"no reward model: its weights have no score\.weight"):
        classifiers.load(str(make_model(tmp_path / "causal", "llama", num_labels=1)))
    with pytest.raises(ModelError, match="no reward model but a LlamaForCausalLM"):
        classifiers.load(str(make_model(tmp_path / "headless", "llama")))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text('{"model_type": "bert", "num_labels": 1}')
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors weights"):
        classifiers.load(str(pickled))
    with pytest.raises(ModelError, match="there is no model folder"):
        classifiers.load(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="cannot be had from the hub"):
        classifiers.load("someone/no-such-model")
    with pytest.raises(BackendError, match="there is no device"):
        classifiers.load(decoder, "abacus")


# -- two answers at once --------------------------------------------------------------------------------------------


def question(first: str, second: str) -> Question:
    return (Message(role="user", content="which engine?"),), first, second


def test_a_pair_encoder_reads_both_answers(encoder: str, tmp_path: Path) -> None:
    """By the name `pair:` or the key in its config; equal to a plain loop over the same text."""
    from transformers import AutoModelForSequenceClassification, BertConfig

    template = "[CLS]{question}[SEP]{first}[SEP]{second}[SEP]"
    config = BertConfig(**ENCODER, num_labels=1, max_position_embeddings=64)
    keyed = save(tmp_path, config, encoder_tokenizer(), spa_lite_pair_template=template)
    pairs = [question(a, b) for a, b in (ANSWERS[:2], ANSWERS[1::-1], ANSWERS[3:5])]
    plain = AutoModelForSequenceClassification.from_pretrained(encoder).eval()
    tokenizer = encoder_tokenizer()
    for name in (f"pair:{encoder}", keyed):
        model = classifiers.load(name, "cpu")
        assert model.compares
        expected = []
        for (asked,), a, b in pairs:
            text = f"[CLS]{asked.content}[SEP]{a}[SEP]{b}[SEP]"
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            with torch.no_grad():
                expected.append(float(plain(input_ids=ids).logits[0, 0]))
        assert model.comparisons(pairs) == pytest.approx(expected, abs=1e-5)
        with pytest.raises(BackendError, match="compares two answers"):
            model.scores([conversation("a heron")])
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("{second}", "{first}"))
    with pytest.raises(ModelError, match=r"needs each of \{question\}, \{first\} and \{second\} once"):
        classifiers.load(keyed)


def test_pairrm(tmp_path: Path) -> None:
    """Its own head, from tensors named as its authors name them, its marks, its limits."""
    from safetensors.torch import save_file
    from transformers import DebertaV2Config, DebertaV2Model

    marks = {"source_prefix_id": 4, "cand1_prefix_id": 5, "cand2_prefix_id": 6}
    shape = ENCODER | {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
    config = DebertaV2Config(**shape, **marks, n_tasks=1, drop_out=0.05, max_position_embeddings=64)
    torch.manual_seed(0)
    body = DebertaV2Model(config).eval()
    first, second = torch.nn.Linear(64, 32), torch.nn.Linear(32, 1)
    head = {
        f"head_layer.{i}.{n}": p.data for i, layer in ((1, first), (4, second)) for n, p in layer.named_parameters()
    }
    tensors = {f"pretrained_model.{name}": value for name, value in body.state_dict().items()} | head
    config.save_pretrained(tmp_path)
    encoder_tokenizer().save_pretrained(tmp_path)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "model.safetensors")
    model = classifiers.load(str(tmp_path), "cpu")
    tokenizer, pairs = encoder_tokenizer(), [question(a, b) for a, b in (ANSWERS[:2], ANSWERS[1::-1], ANSWERS[2:4])]
    for ours, ((asked,), a, b) in zip(model.comparisons(pairs), pairs, strict=True):
        parts = zip(MARKS[4:], (asked.content, a, b), strict=True)
        ids = torch.tensor([[i for mark, text in parts for i in tokenizer.encode(mark + text)]])
        with torch.no_grad():
            states = body(input_ids=ids).last_hidden_state
            at = [states[0, (ids[0] == mark).nonzero()[0, 0]] for mark in (4, 5, 6)]
            scores = [float(second(torch.tanh(first(torch.cat([at[0], one]))))) for one in at[1:]]
        assert ours == pytest.approx(scores[0] - scores[1], abs=1e-5)
    model.comparisons([question("a heron " * 2000, "the baker")])
    assert model.cut == 1
    (tmp_path / "model.safetensors").unlink()
    save_file({name: value.contiguous() for name, value in body.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"the weights of .* cannot be used"):
        classifiers.load(str(tmp_path))


# -- judges ---------------------------------------------------------------------------------------------------------


class Counting:
    """A classifier that likes the letter e."""

    name, fingerprint, compares, cut = "counting", "1", False, 0

    def tokens(self, text: str) -> int:
        return len(text.split())

    def scores(self, conversations: Sequence[Sequence[Message]], tick: Tick = lambda: None) -> list[float]:
        for _ in conversations:
            tick()
        return [float(turns[-1].content.count("e")) for turns in conversations]

    def comparisons(self, questions: Sequence[Question], tick: Tick = lambda: None) -> list[float]:
        for _ in questions:
            tick()
        return [a.count("e") - b.count("e") + 0.5 for _, a, b in questions]  # and likes what comes first


def sample(*texts: str, ids: bool = True) -> Sample:
    asked = (Message(role="user", content="which?"),)
    told = tuple(
        Completion(ids=tuple(range(3 * len(text.split()))) if ids else (), text=text, ended="eos") for text in texts
    )
    return Sample(id="x", messages=asked, prompt_ids=(1,), completions=told)


def test_rewards_are_log_odds_less_the_length_penalty() -> None:
    """Tokens are the sample's, or the classifier's own where it has none. A tick per sample."""
    ticks: list[int] = []
    pile = [sample("e e e", "e"), sample("x", "ee", "e", ids=False)]
    plain = RewardJudge(Counting())(pile, lambda: ticks.append(1))
    assert [o.scores for o in plain] == [(3.0, 1.0), (0.0, 2.0, 1.0)]
    assert plain[0].p(0, 1) == pytest.approx(1 / (1 + math.exp(-2)))
    assert len(ticks) == 2
    penalised = RewardJudge(Counting(), 0.5)
    assert [o.scores for o in penalised(pile)] == [(3 - 4.5, 1 - 1.5), (-0.5, 1.5, 0.5)]
    assert penalised.key != RewardJudge(Counting()).key
    assert "0.5 per token" in penalised.name


def test_a_pair_encoder_judges_in_both_orders() -> None:
    """What it says for the first place cancels."""
    ticks: list[int] = []
    (same, three) = PairEncoderJudge(Counting())([sample("e", "e"), sample("e", "eee", "x")], lambda: ticks.append(1))
    assert same.p(0, 1) == pytest.approx(0.5)
    assert [(v.first, v.second) for v in same.verdicts] == [(0, 1), (1, 0)]
    assert three.scores.index(max(three.scores)) == 1
    assert three.scores.index(min(three.scores)) == 2
    assert len(ticks) == 2


def test_fingerprints(decoder: str, encoder: str) -> None:
    """A classifier's fingerprint tells it from others, and from itself used as a pair encoder."""
    names = [decoder, encoder, f"pair:{encoder}"]
    prints = [classifiers.load(name, "cpu").fingerprint for name in names]
    assert len({*prints}) == 3
    assert prints == [classifiers.load(name, "cpu").fingerprint for name in names]


def test_the_vocabulary_has_the_marks() -> None:
    """What the tests above rely on."""
    assert encoder_tokenizer().convert_tokens_to_ids(MARKS) == list(range(len(MARKS)))
    assert make_tokenizer().convert_tokens_to_ids(SPECIALS) == list(range(len(SPECIALS)))

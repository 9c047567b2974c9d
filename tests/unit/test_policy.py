"""PPO over live networks: what is exact before the first step, a bandit with a known optimum, and faults of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fakes import ByteTokenizer
from llama2.align.experience import Experience, PromptBatch, RenderedPrompt, RolloutSettings, reference_logprobs
from llama2.align.feedback import DrawnAnswer, Feedback, Judgement
from llama2.align.handover import Handover
from llama2.align.surrogate import RolloutBatch, Surrogate, token_scores
from llama2.config import ModelConfig
from llama2.data.loader import Loader
from llama2.data.prompts import TaggedPrompt
from llama2.errors import DataError, RunError
from llama2.model import lora
from llama2.model.heads import PolicyAndValue, RewardTransformer
from llama2.model.transformer import Transformer
from llama2.train.objective import Network
from llama2.train.settings import OptimizerSettings
from llama2.train.step import Step
from models import tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

END = 2


class Tokenizer(ByteTokenizer):
    """Has no bytes for the tokens beyond them."""

    vocab_size = 320

    def token_bytes(self, token: int) -> bytes:
        return super().token_bytes(min(token, 256))


class Prompts:
    """A loader's rows."""

    name, length, sha256 = "prompts", 8, "prompts"

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.prompts = []
        for i, prompt in enumerate(prompts):
            tagged = TaggedPrompt(str(i), ({"role": "user", "content": str(i)},), i % 2 == 1)
            self.prompts.append(RenderedPrompt(tagged, np.array(prompt, np.int32)))

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, numbers: Sequence[int]) -> PromptBatch:
        return PromptBatch(tuple(self.prompts[number] for number in numbers))


Reward = Callable[[Sequence[DrawnAnswer]], Sequence[float]]


def by(reward: Reward) -> Callable[[Sequence[TaggedPrompt], Sequence[DrawnAnswer]], Judgement]:
    """A judge of answers alone."""
    return lambda _, answers: Judgement({}, np.array(reward(answers), np.float64))


def longer(answers: Sequence[DrawnAnswer]) -> list[float]:
    return [min(0.9, 0.1 + answer.tokens / 50) for answer in answers]


def policy(config: ModelConfig, *, adapted: bool = False, dropout: float = 0.0) -> PolicyAndValue:
    """A random policy with a value network of the same shape, frozen but for adapters if `adapted`."""
    parts = []
    for seed in (0, 1):
        network = Transformer(config)
        network.initialise(torch.Generator().manual_seed(seed))
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.data *= 4  # so that answers differ from noise
        if adapted:
            lora.attach(
                network, lora.Lora(4, 8.0, dropout, ("q_proj", "down_proj")), torch.Generator().manual_seed(seed)
            )
        parts.append(network)
    value = RewardTransformer(config)
    value.tok_embeddings, value.layers, value.norm = parts[1].tok_embeddings, parts[1].layers, parts[1].norm
    return PolicyAndValue.of(parts[0], value)


class Run:
    """A policy with everything around it."""

    def __init__(
        self,
        network: PolicyAndValue,
        prompts: Sequence[Sequence[int]],
        judge: Any,
        *,
        micro_size: int = 4,
        lr: float = 0.0,
        value_weight: float = 0.1,
        **settings: Any,
    ) -> None:
        self.surrogate = Surrogate(0.2, 0.2, value_weight)
        self.step = Step(network, self.surrogate, optimizer=OptimizerSettings(weight_decay=0.0), precision="fp32")
        self.lr = lr
        chosen: dict[str, Any] = {
            "rollouts": 16, "max_tokens": 12, "stop_tokens": frozenset({END}), "seed": 0, "beta": 0.01,
            "gamma": 1.0, "lam": 0.95, "whiten": True,
        } | settings  # fmt: skip
        reference = None
        if not any(isinstance(module, lora.LoraLinear) for module in network.modules()):
            start = Transformer(network.config)
            names = start.state_dict().keys()
            start.load_state_dict({name: network.state_dict()[name].clone() for name in names})
            reference = Network(start.requires_grad_(False), self.surrogate, None)
        handover = Handover(network, 128, Tokenizer(), 1)
        self.experience = Experience(
            self.step,
            Loader(Prompts(prompts), rows=micro_size, seed=0),
            handover.engine,
            judge,
            RolloutSettings(**chosen),
            reference=reference,
            changed=handover,
        )

    def iterate(self, steps: int = 1) -> list[RolloutBatch]:
        """All micro-batches of an iteration, learned from in so many steps; those batches."""
        found = [self.experience.next()]
        while self.experience._left:
            found.append(self.experience.next())
        size = len(found) // steps
        for i in range(steps):
            self.step.step(found[i * size : (i + 1) * size], self.lr, self.experience.iteration)
        return found


PROMPTS = [list(range(3, 3 + n)) for n in (2, 5, 9, 40, 17, 3, 60, 11)]


@pytest.mark.parametrize("adapted", [False, True], ids=["weights", "adapters"])
def test_before_the_first_step_ratios_are_one_and_the_divergence_zero(adapted: bool) -> None:
    run = Run(policy(tiny_config(), adapted=adapted), PROMPTS, by(longer), rollouts=64, micro_size=8)
    batches = run.iterate()
    seen = run.surrogate.means()
    assert seen["ratio_away"] <= 1e-6
    assert abs(run.experience.measured["kl"]) <= 1e-6
    assert sum(batch.count for batch in batches) == sum(len(batch.targets) for batch in batches) > 64 * 4
    for batch in batches:  # of each token, not of their mean
        theirs = reference_logprobs(run.experience._reference or run.step.running, batch)
        assert np.abs(batch.logprobs - theirs.detach().numpy()).max() <= 1e-6
        assert (batch.values == 0).all()  # a value head that begins large would drown the rewards
    advantages = np.concatenate([batch.advantages for batch in batches])
    assert (advantages.mean(), advantages.std()) == (pytest.approx(0, abs=1e-5), pytest.approx(1, abs=1e-5))


def test_the_policy_learns_and_its_reference_stays() -> None:
    """The reward is the share of one token; the reference is what the policy was, whatever it becomes."""
    run = Run(policy(tiny_config(), adapted=True), PROMPTS, by(longer), lr=3e-3, rollouts=32, micro_size=8)
    (first, *_) = run.iterate(2)
    before = reference_logprobs(run.step.running, first).detach()  # by the policy as it is now
    with lora.without_adapters(run.step.network):
        start = reference_logprobs(run.step.running, first).detach()
    np.testing.assert_allclose(start.numpy(), first.logprobs, atol=1e-6)
    assert (before - start).abs().max() > 1e-3
    for _ in range(6):
        run.iterate(2)
    assert run.experience.measured["kl"] > 0.01
    assert run.experience.measured["engine_gap"] < 0.05  # the engine draws from the weights as they are


#: A vocabulary of two tokens; an answer is one of them.
BANDIT = ModelConfig(
    dim=32, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=32, vocab_size=2, head_dim=16, context_length=64
)


def bandit(beta: float, iterations: int, lr: float) -> list[float]:
    """The probability of the better arm, 1, after each iteration; half at first."""
    network = policy(BANDIT)
    assert network.output is not None
    torch.nn.init.zeros_(network.output.weight)
    better = by(lambda answers: [0.6 if answer.text == "!\ufffd" else 0.4 for answer in answers])
    fixed: dict[str, Any] = {"max_tokens": 1, "stop_tokens": frozenset(), "gamma": 1.0, "lam": 1.0, "whiten": False}
    run = Run(network, [[0]], better, lr=lr, rollouts=256, micro_size=256, beta=beta, value_weight=0.0, **fixed)
    found = []
    for _ in range(iterations):
        run.iterate()
        with torch.no_grad():
            logits = network.logits(network.hidden_states(torch.tensor([[0]])))
        found.append(float(logits[0, -1].softmax(-1)[1]))
    return found


def test_a_bandit_of_two_tokens_is_solved() -> None:
    assert bandit(0.01, 40, 1e-2)[-1] > 0.95


def test_the_divergence_decides_where_a_bandit_ends() -> None:
    """Whitened rewards of two values are √((1 − p) / p) and −√(p / (1 − p)), apart by 1 / √(p (1 − p)).

    So the log-odds of the optimum solve log(p / (1 − p)) = 1 / (β √(p (1 − p))), from even odds: for β = 4, p = 0.626.
    """
    p = 0.5
    for _ in range(100):
        p = 1 / (1 + math.exp(-1 / (4 * math.sqrt(p * (1 - p)))))
    assert p == pytest.approx(0.626, abs=1e-3)
    found = bandit(4.0, 60, 2e-3)
    assert np.mean(found[-20:]) == pytest.approx(p, abs=0.05)


def test_with_an_infinite_weight_of_the_divergence_nothing_moves() -> None:
    found = bandit(1e6, 30, 1e-3)
    assert max(abs(each - 0.5) for each in found) < 0.02


def test_an_end_token_that_is_also_the_padding_is_learned() -> None:
    """Token 0 fills rows and ends answers, as in models whose end token is their padding; it has its loss."""
    network = policy(tiny_config())
    assert network.output is not None
    network.output.weight.data[0] *= 2  # so that some answers end, and some do not
    run = Run(network, PROMPTS, by(longer), stop_tokens=frozenset({0}), max_tokens=40, micro_size=16)
    (batch,) = run.iterate()
    assert 0 < run.experience.measured["cut"] < 1
    ended = int(np.isin(batch.targets, (0, 256)).sum())  # the latter is the tokenizer's own
    assert ended == round(16 * (1 - run.experience.measured["cut"]))
    assert batch.tokens.flatten()[batch.places + 1].tolist() == batch.targets.tolist()
    assert len(batch.targets) == round(16 * run.experience.measured["tokens"])


def test_the_reward_is_on_the_end_token_and_not_behind_it() -> None:
    """With γ = λ = 1, β = 0 and values of 0, each token's advantage is its answer's whitened reward, the last's too."""
    run = Run(policy(tiny_config()), PROMPTS, by(longer), beta=0.0, lam=1.0, whiten=False, micro_size=16, max_tokens=40)
    (batch,) = run.iterate()
    sizes = np.diff(np.flatnonzero(np.diff(batch.places, prepend=-9) != 1), append=len(batch.places))
    assert len(sizes) == 16
    rewards = np.log(np.minimum(0.9, 0.1 + sizes / 50) / (1 - np.minimum(0.9, 0.1 + sizes / 50)))
    rewards = (rewards - rewards.mean()) / rewards.std()
    np.testing.assert_allclose(batch.advantages, np.repeat(rewards, sizes), atol=1e-5)
    np.testing.assert_allclose(batch.returns, batch.advantages)


def test_a_step_is_the_mean_over_tokens_however_they_are_divided() -> None:
    """Not over micro-batches, whose answers have unlike many tokens."""
    network = policy(tiny_config(), adapted=True)
    run = Run(network, PROMPTS, by(longer), micro_size=2, max_tokens=40)
    batches = [run.experience.next()]
    while run.experience._left:
        batches.append(run.experience.next())
    assert len({batch.count for batch in batches}) > 2
    parts = run.step.step(batches, 0.0)
    weights = np.array([batch.count for batch in batches], float)
    alone = [run.step.step([batch], 0.0).loss for batch in batches]
    assert parts.loss == pytest.approx(float((alone * weights).sum() / weights.sum()), rel=1e-4)
    assert parts.loss != pytest.approx(float(np.mean(alone)), rel=1e-3)


def test_answers_in_one_row_do_not_read_each_other() -> None:
    network = policy(tiny_config())
    run = Run(network, PROMPTS, by(longer), micro_size=16)
    (batch,) = run.iterate()
    assert len(batch.tokens) < 16  # rows hold several
    with torch.no_grad():
        logprobs, values, _ = token_scores(run.step.running, batch)
        torch.nn.init.ones_(network.value.score.weight)
        _, values, _ = token_scores(run.step.running, batch)
        for start in np.flatnonzero(np.diff(batch.places, prepend=-9) != 1):
            row, at = divmod(int(batch.places[start]), batch.tokens.shape[1])
            mine = batch.documents[row] == batch.documents[row, at]
            tokens = torch.from_numpy(batch.tokens[row][mine])[None]
            before = int(np.flatnonzero(mine)[0])
            alone = network.logits(network.hidden_states(tokens))[0, at - before].log_softmax(-1)
            assert logprobs[start].item() == pytest.approx(alone[batch.targets[start]].item(), abs=1e-5)
            states = network.value.hidden_states(tokens)
            assert values[start].item() == pytest.approx(network.value.scores(states)[0, at - before].item(), abs=1e-4)


def test_an_end_token_in_the_prompt_ends_no_answer() -> None:
    """A dialog of several turns has some; whether the answer ended is what its own last token says."""
    run = Run(policy(tiny_config()), [[3, END, 4, END, 5]], by(longer), max_tokens=2, stop_tokens=frozenset({END}))
    rollouts = run.experience.draw(run.experience._loader.next().prompts, [0, 1])
    assert [each.ended for each in run.experience.answers(rollouts)] == [bool(r.tokens[-1] == END) for r in rollouts]
    assert not all(each.ended for each in run.experience.answers(rollouts))


def test_ratios_are_of_torchs_numbers_and_dropout_would_move_them() -> None:
    """The engine's log-probabilities are of other arithmetic: that gap is measured, and is in no ratio."""
    run = Run(policy(tiny_config(), adapted=True), PROMPTS, by(longer))
    run.iterate()
    assert run.experience.measured["engine_gap_max"] > 1e-6
    assert run.surrogate.means()["ratio_away"] <= 1e-6
    dropped = policy(tiny_config(), adapted=True, dropout=0.5)
    for name, weight in dropped.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    run = Run(dropped, PROMPTS, by(longer))
    run.iterate()
    assert run.surrogate.means()["ratio_away"] > 1e-3


def test_answers_are_drawn_at_temperature_one_with_nothing_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama2.align import experience

    seen = []
    real = experience.rollout

    def spy(engine: Any, prompts: Any, n: int, sampling: Any, **options: Any) -> Any:
        seen.append((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed))
        return real(engine, prompts, n, sampling, **options)

    monkeypatch.setattr(experience, "rollout", spy)
    run = Run(policy(tiny_config()), PROMPTS, by(longer), rollouts=4)
    run.iterate()
    run.iterate()
    assert [each[:4] for each in seen] == [(1, 1, 0, 0)] * 2
    assert seen[0][4] != seen[1][4]


def test_a_stale_prefix_cache_shows_and_is_flushed() -> None:
    """Without the flush, prompts of more than a block are read with keys and values of weights that have changed."""
    long = [list(range(3, 3 + 40)), list(range(3, 3 + 50))]
    gaps = []
    for flush in (True, False):
        run = Run(policy(tiny_config()), long, by(longer), lr=2e-2)
        if not flush:
            run.experience._changed = run.experience.engine.runner.weights_changed  # type: ignore[attr-defined]
        for _ in range(4):
            run.iterate()
        gaps.append(run.experience.measured["engine_gap"])
    assert gaps[0] < 0.05
    assert gaps[1] > 5 * gaps[0]


def test_the_engine_draws_from_an_adapter_on_four_bits() -> None:
    """The adapter is added to the dequantized matrix in float32: rounded to 4 bits, or left out, the gap would show."""
    network = policy(tiny_config(), adapted=True)
    rng = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(weight, std=0.3, generator=rng)
    update = lora.merged(network)["layers.0.attention.wq.weight"]
    layer = network.get_submodule("layers.0.attention.wq")
    assert isinstance(layer, lora.LoraLinear)
    expected = layer.base.weight.detach() + 2.0 * (layer.lora_b @ layer.lora_a).detach()  # alpha 8 / rank 4
    np.testing.assert_allclose(update.dequantize(), expected.numpy(), atol=1e-6)
    assert update.format == "F32"
    run = Run(network, PROMPTS, by(longer))
    run.iterate()
    assert run.experience.measured["engine_gap"] < 0.05


@pytest.mark.parametrize("reward", [0.0, 0.3, 1.0])
def test_equal_rewards_and_rewards_at_the_ends_teach_nothing_and_break_nothing(reward: float) -> None:
    run = Run(
        policy(tiny_config(), adapted=True), PROMPTS, by(lambda answers: [reward] * len(answers)), beta=0.0, lr=1e-2
    )
    before = {name: weight.clone() for name, weight in run.step.network.named_parameters() if weight.requires_grad}
    (batch, *_) = run.iterate()
    assert (batch.advantages == 0).all()
    for name, weight in run.step.network.named_parameters():
        if name in before and not name.startswith("value."):
            assert torch.equal(weight, before[name]), name


class Scorer:
    """The reward is the answer's share of a letter."""

    def __init__(self, letter: str) -> None:
        self.letter, self.digest = letter, letter
        self.read: list[str] = []

    def __call__(self, dialogs: Sequence[Sequence[Any]]) -> list[float]:
        self.read += [dialog[-1]["content"] for dialog in dialogs]
        return [dialog[-1]["content"].count(self.letter) / len(dialog[-1]["content"]) for dialog in dialogs]


def prompts(*tagged: bool) -> list[TaggedPrompt]:
    return [TaggedPrompt(str(i), ({"role": "user", "content": "q"},), safety) for i, safety in enumerate(tagged)]


def test_the_reward_is_piecewise_and_an_answer_that_was_cut_has_its_own() -> None:
    feedback = Feedback({"helpful": Scorer("h"), "safety": Scorer("s"), "watched": Scorer("w")}, 0.15, 0.05)
    answers = [DrawnAnswer(text, ended, 5) for text, ended in
               [("hhs", True), ("hhs", True), ("hhhhhhhhhs", True), ("hhs", False), ("  ", True)]]  # fmt: skip
    found = feedback(prompts(False, True, False, False, False), answers)
    assert found.reward.tolist() == pytest.approx([2 / 3, 1 / 3, 0.1, 0.05, 0.05])
    measured = found.measures()
    assert measured["helpful"] == pytest.approx((2 / 3 * 3 + 0.9) / 4)  # of what it read
    assert measured["unsafe"] == pytest.approx(1 / 5)
    assert measured["watched"] == 0
    whole = Feedback({"helpful": Scorer("h")}, 0.15, None)(prompts(False, False), answers[3:])
    assert whole.reward.tolist() == pytest.approx([2 / 3, 0])


@pytest.mark.parametrize("reward", [math.nan, math.inf, 1.5, -0.1])
def test_a_reward_that_is_not_from_0_to_1_is_refused(reward: float) -> None:
    scorer = Scorer("h")
    scorer.__class__ = type("Bad", (Scorer,), {"__call__": lambda self, dialogs: [reward] * len(dialogs)})
    with pytest.raises(DataError, match=r"rewards\.safety: its reward .* is not from 0 to 1"):
        Feedback({"safety": scorer}, 0.15, 0.05)(prompts(False), [DrawnAnswer("a", True, 1)])


def test_no_state_within_an_iteration() -> None:
    run = Run(policy(tiny_config()), PROMPTS, by(longer))
    run.experience.next()
    with pytest.raises(RunError, match=r"save\.every must be a multiple"):
        run.experience.state()

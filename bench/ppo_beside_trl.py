"""PPO beside TRL's: first losses on the same answers, and wall time per 1,000 tokens that are drawn.

    python bench/ppo_beside_trl.py losses > losses.json
    python bench/ppo_beside_trl.py speed MODEL-HF REWARD-HF PROMPTS > speed.json

TRL 1.12.0 is the last that has PPO. It needs an environment of its own:

    python -m venv trl-env
    trl-env/bin/pip install torch==2.13.0
    trl-env/bin/pip install trl==1.12.0 peft==0.21.2 transformers==5.24.0 '.[train]'

`losses` gives both sides the same tiny Llama, value network, answers and rewards, in float32, for a few updates with
one mini-batch each. What both define alike must agree within 1e-4: the policy's loss and the value's. Where they
differ, the comparison does without:

- TRL puts an answer's reward on the token after its end token, we on the end token. Answers here do not end.
- TRL takes the reward model's score as it is, we LOGIT and whiten it. Both get the same numbers here.
- TRL whitens advantages by the sample variance, we by the population's. Neither whitens here.
- TRL looks for the end token's id to find the end, and pads by an id; we know the places.
- TRL's loss is a mean over each micro-batch, ours over the mini-batch. Here there is one micro-batch.
- TRL draws by `generate` and takes its scores for old log-probabilities; we read the answers again.

`speed` trains all weights of a model such as `llama2 convert smollm2-135m-instruct MODEL-HF --to hf` writes, with a
reward model of the same shape, which is also the value network. Both sides answer the same prompts, by turns, in one
process. Drawing is timed apart from the rest, which judges and learns. Tokens are those of answers up to their end.
Exit code 1 says that a goal was missed: losses within 1e-4, half of TRL's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance

from llama2 import checkpoint
from llama2 import recipe as recipes
from llama2.align import ppo as our_ppo
from llama2.align.experience import Experience, PromptBatch, RenderedPrompt, RolloutSettings
from llama2.align.feedback import Judgement
from llama2.align.ppo_prompts import Prompts, prepare
from llama2.align.ppo_recipe import PpoRecipe, fit
from llama2.align.scorers import open_scorers
from llama2.align.surrogate import Surrogate
from llama2.checkpoint import Checkpoint
from llama2.data.loader import Loader
from llama2.data.prompts import TaggedPrompt
from llama2.engine.rollout import Rollout
from llama2.model.heads import PolicyAndValue, RewardTransformer
from llama2.model.transformer import Transformer
from llama2.records import installed
from llama2.train.objective import Network
from llama2.train.processes import Processes
from llama2.train.settings import OptimizerSettings
from llama2.train.step import Step

ALLOWED, SPEED = 1e-4, 0.5
VOCABULARY, PROMPT, ANSWER, ANSWERS, UPDATES, RATE = 320, 9, 14, 8, 3, 1e-3
PAD, BOS, EOS = 0, 1, 2
BETA, GAMMA, LAM, CLIP, WEIGHT = 0.05, 1.0, 0.95, 0.2, 0.1
_ASKED = ({"role": "user", "content": ""},)


def write_models(folder: Path) -> None:
    """A tiny policy, and a value network of its shape whose head is 0, as transformers writes them."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": BOS,
        "eos_token_id": EOS, "pad_token_id": PAD, "initializer_range": 0.1,
    }  # fmt: skip
    kinds: dict[str, Any] = {"policy": LlamaForCausalLM, "value": LlamaForSequenceClassification}
    for seed, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        value: dict[str, Any] = {"num_labels": 1, "tie_word_embeddings": True} if name == "value" else {}
        configuration: Any = LlamaConfig(**{**shape, **value})
        model = kind(configuration)
        if value:
            torch.nn.init.zeros_(model.score.weight)
        model.save_pretrained(folder / name)
        if value:  # our reward models call themselves so, and transformers opens them as the other
            config = folder / name / "config.json"
            changed = {"architectures": [LlamaForCausalLM.__name__], "extra_tensors": ["score.weight"]}
            config.write_text(json.dumps(json.loads(config.read_text()) | changed))


def fixed() -> tuple[Any, Any, Any]:
    """Prompts and answers of random tokens, none of them special, and rewards."""
    rng = np.random.default_rng(0)
    prompts, answers = (rng.integers(3, VOCABULARY, (ANSWERS, length)) for length in (PROMPT, ANSWER))
    return prompts, answers, rng.normal(size=ANSWERS)


def configuration(folder: Path, **changed: Any) -> Any:
    """TRL's settings: one epoch, one mini-batch, our γ, λ and β."""
    from trl.experimental.ppo import PPOConfig

    given: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "num_ppo_epochs": 1, "num_mini_batches": 1, "gradient_accumulation_steps": 1,
        "num_sample_generations": 0, "response_length": ANSWER, "temperature": 1.0, "kl_coef": BETA, "gamma": GAMMA,
        "lam": LAM, "cliprange": CLIP, "cliprange_value": CLIP, "vf_coef": WEIGHT, "learning_rate": RATE,
        "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "bf16": False, "logging_steps": 1, "seed": 0, "stop_token": "eos", "gradient_checkpointing": False,
    } | changed  # fmt: skip
    return PPOConfig(**given)


def their_losses(folder: Path) -> list[tuple[float, float]]:
    """Policy's and value's loss of each update by TRL, on the fixed answers."""
    import trl.experimental.ppo.ppo_trainer as trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl_parity import tokenizer

    prompts, answers, rewards = fixed()
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy") for _ in range(2))
    value, judge = (AutoModelForSequenceClassification.from_pretrained(folder / "value") for _ in range(2))
    whole = torch.from_numpy(np.concatenate((prompts, answers), 1))

    def generated(model: Any, queries: Any, *_: Any) -> tuple[Any, Any]:
        order = [next(i for i, p in enumerate(prompts) if (p == q.numpy()).all()) for q in queries]
        chosen = whole[order]
        logits = trl.forward(model, chosen, PAD).logits[:, PROMPT - 1 : -1]
        generated.order = order  # type: ignore[attr-defined]
        return chosen, logits

    scored = trl.get_reward

    def get_reward(model: Any, *rest: Any) -> Any:
        found = scored(model, *rest)
        if model is not judge:
            return found
        return found[0], torch.from_numpy(rewards[generated.order]).float(), found[2]  # type: ignore[attr-defined]

    trl.batch_generation, trl.get_reward = generated, get_reward
    trl.masked_whiten = lambda values, *_, **__: values
    trainer = trl.PPOTrainer(
        args=configuration(
            folder,
            total_episodes=ANSWERS * UPDATES,
            per_device_train_batch_size=ANSWERS,
            local_rollout_forward_batch_size=ANSWERS,
        ),
        processing_class=tokenizer(),
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
    )
    found = []
    trainer.log = lambda metrics, *_: found.append((metrics["loss/policy_avg"], metrics["loss/value_avg"]))
    trainer.train()
    return found


class FixedRewards:
    """A judge whose rewards become the fixed ones after LOGIT and whitening are left out."""

    def __call__(self, prompts: Any, answers: Any) -> Judgement:
        return Judgement({}, np.array([float(prompt.id) for prompt in prompts]))


def our_losses(folder: Path) -> list[tuple[float, float]]:
    """Policy's and value's loss of each update by us, on the fixed answers."""
    from llama2.align import experience

    prompts, answers, rewards = fixed()
    with checkpoint.open(folder / "policy") as policy, checkpoint.open(folder / "value") as value:
        network = PolicyAndValue.of(Transformer.load(policy), RewardTransformer.load(value))
        reference = Network(Transformer.load(policy).requires_grad_(False), lambda *_: torch.zeros(()), None)
    surrogate = Surrogate(CLIP, CLIP, WEIGHT)
    optimizer = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, clip=1e9)
    step = Step(network, surrogate, optimizer=optimizer, precision="fp32")
    rendered = [
        RenderedPrompt(
            TaggedPrompt(repr(float(reward)), ({"role": "user", "content": ""},), False), prompt.astype(np.int32)
        )
        for prompt, reward in zip(prompts, rewards, strict=True)
    ]
    by_prompt = {tuple(p.tolist()): a for p, a in zip(prompts, answers, strict=True)}

    class Source:
        name, length, sha256 = "fixed", PROMPT + ANSWER, ""

        def __len__(self) -> int:
            return ANSWERS

        def batch(self, numbers: Any) -> PromptBatch:
            return PromptBatch(tuple(rendered[number] for number in numbers))

    class Fixed(Experience):
        def draw(self, prompts: Any, seed: Any) -> list[Rollout]:
            chosen = [by_prompt[tuple(prompt.tokens.tolist())].astype(np.int32) for prompt in prompts]
            return [Rollout(answer, np.zeros(ANSWER, np.float32), "length", 0) for answer in chosen]

        def answers(self, rollouts: Any) -> Any:
            from llama2.align.feedback import DrawnAnswer

            return [DrawnAnswer(str(i), False, ANSWER) for i in range(len(rollouts))]

    for name in ("logit", "whiten"):
        setattr(experience, name, np.asarray)
    settings = RolloutSettings(ANSWERS, ANSWER, frozenset(), 0, BETA, GAMMA, LAM, whiten=False)
    made = Fixed(
        step, Loader(Source(), rows=ANSWERS, seed=0), None, FixedRewards(), settings,  # type: ignore[arg-type]
        reference=reference, changed=lambda: None,
    )  # fmt: skip
    found = []
    for number in range(1, UPDATES + 1):
        step.step([made.next()], RATE, number)
        means = surrogate.means()
        found.append((means["policy_loss"], means["value_loss"]))
    return found


def losses(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Both sides' losses, update by update."""
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name))
        ours, theirs = our_losses(Path(name)), their_losses(Path(name))
    gaps = [max(abs(a - b) for a, b in zip(one, other, strict=True)) for one, other in zip(ours, theirs, strict=True)]
    for number, (one, other, gap) in enumerate(zip(ours, theirs, gaps, strict=True), 1):
        print(f"update {number}: policy, value: {one}, TRL {other}; apart by {gap:.1e}", file=sys.stderr)
    return {"ours": ours, "theirs": theirs, "apart": gaps}, max(gaps) <= ALLOWED


def speed(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """Seconds of both sides by turns, and the answers' tokens."""
    table = {
        "start": str(options.model), "precision": "bf16" if options.bf16 else "fp32", "iterations": options.repeat + 1,
        "rollouts": options.answers, "max_tokens": options.tokens, "prompts": {"files": [str(options.prompts)]},
        "rewards": {"helpful": str(options.reward), "cut": "score"}, "batch": {"size": options.answers},
        "runtime": {"sequences": 4},
    }  # fmt: skip
    recipe = recipes.make(table, PpoRecipe, where="speed")
    with (
        checkpoint.open(options.model) as start,
        checkpoint.open(options.reward) as value,
        open_scorers(recipe.rewards.models, recipe.runtime) as scorers,
        tempfile.TemporaryDirectory() as folder,
    ):
        ready = prepare(recipe, start, start.config.context_length)
        source = Prompts("prompts", ready.train, options.tokens)
        recipe = fit(recipe, source.length, start.config)
        network = our_ppo.network_of(start, value, recipe, Processes(torch.device("cpu")))
        surrogate = Surrogate(recipe.clip, recipe.value_clip, recipe.value_weight)
        step = Step(network, surrogate, optimizer=recipe.optimizer, precision=recipe.precision)
        loader = Loader(source, rows=recipe.batch.micro_size, seed=0)
        made = our_ppo.experience_of(recipe, step, loader, start, scorers, ready)
        accumulate = recipe.batch.size // recipe.batch.micro_size
        ours: list[dict[str, float]] = []

        def one() -> None:
            begun = time.perf_counter()
            step.step([made.next() for _ in range(accumulate)], recipe.optimizer.lr, made.iteration)
            seconds = time.perf_counter() - begun
            tokens = made.measured["tokens"] * options.answers
            ours.append({"draw": made.seconds["draw"], "learn": seconds - made.seconds["draw"], "tokens": tokens})

        theirs = their_speed(options, start, ready.train, Path(folder), one)
    found: dict[str, Any] = {"ours": ours[1:], "theirs": theirs[1:]}  # the first of each fills caches
    rates = {}
    for name, sides in found.items():
        for part in ("draw", "learn", "whole"):
            found_seconds = [s["draw"] + s["learn"] if part == "whole" else s[part] for s in sides]
            each = [1000 * seconds / s["tokens"] for seconds, s in zip(found_seconds, sides, strict=True)]
            rates[f"{name} {part}"] = statistics.median(each)
    ratio = rates["ours whole"] / rates["theirs whole"]
    for part in ("draw", "learn", "whole"):
        mine, other = rates[f"ours {part}"], rates[f"theirs {part}"]
        print(f"{part:5} {mine:.2f} s per 1,000 tokens, TRL {other:.2f}", file=sys.stderr)
    print(f"ratio {ratio:.2f}", file=sys.stderr)
    return found | {"seconds_per_1000_tokens": rates, "ratio": ratio}, ratio <= SPEED


def their_speed(  # 66 lines: the set-up of TRL, which has one use
    options: argparse.Namespace, start: Checkpoint, prompts: Any, folder: Path, between: Any
) -> list[dict[str, float]]:
    """TRL's seconds of each update; `between` runs ours before each."""
    import trl.experimental.ppo.ppo_trainer as trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # else TRL takes the end for padding
    policy, reference = (AutoModelForCausalLM.from_pretrained(options.model) for _ in range(2))
    value, judge = (AutoModelForSequenceClassification.from_pretrained(options.reward, num_labels=1) for _ in range(2))
    for model in (policy, reference, value, judge):
        model.resize_token_embeddings(max(len(tokenizer), model.config.vocab_size))
        model.config.pad_token_id = tokenizer.pad_token_id
    found: list[dict[str, float]] = []
    real = trl.batch_generation

    def timed(*given: Any) -> Any:
        begun = time.perf_counter()
        made, logits = real(*given)
        answers = made[:, given[1].shape[1] :]
        ends = answers == tokenizer.eos_token_id
        lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, answers.shape[1])
        found.append({"draw": time.perf_counter() - begun, "tokens": float(lengths.sum())})
        return made, logits

    class Between(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            between()
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            found[-1]["learn"] = time.perf_counter() - self.begun - found[-1]["draw"]
            between()
            self.begun = time.perf_counter()

    trl.batch_generation = timed
    rows = [prompt.tokens.tolist() for prompt in prompts]
    trainer = trl.PPOTrainer(
        args=configuration(
            folder,
            total_episodes=options.answers * (options.repeat + 1),
            response_length=options.tokens,
            per_device_train_batch_size=options.answers // options.accumulate,
            gradient_accumulation_steps=options.accumulate,
            local_rollout_forward_batch_size=options.answers,
            bf16=options.bf16,
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=judge,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows[:2]}),
        callbacks=[Between()],
    )
    trainer.train()
    return found


def main() -> int:
    """Measure, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("losses", help="the first losses on the same answers").set_defaults(measure=losses)
    timed = commands.add_parser("speed", help="wall time per 1,000 tokens drawn")
    timed.add_argument("model", type=Path, help="a folder as transformers reads it")
    timed.add_argument("reward", type=Path, help="a reward model of its shape, likewise")
    timed.add_argument("prompts", type=Path, help="as for `llama2 ppo`")
    timed.add_argument("--answers", type=int, default=16, help="of an update")
    timed.add_argument("--tokens", type=int, default=128, help="of an answer, at most")
    timed.add_argument("--repeat", type=int, default=3, help="updates that count")
    timed.add_argument("--accumulate", type=int, default=4, help="micro-batches of TRL's update")
    timed.add_argument("--bf16", action="store_true", help="products in bfloat16 on both sides")
    timed.set_defaults(measure=speed)
    options = parser.parse_args()
    with redirect_stdout(sys.stderr):  # where transformers prints, too
        found, good = options.measure(options)
    versions = {name: installed(name) for name in ("trl", "transformers", "torch")}
    print(json.dumps(provenance() | {"versions": versions, "met": good, "measured": found}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

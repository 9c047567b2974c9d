"""The recipes that come with the project: all are whole, and say the paper's numbers."""

from pathlib import Path

import pytest

from llama2 import recipe as recipes
from llama2.align.distillation_settings import DistilRecipe
from llama2.align.gatt_settings import GattRecipe
from llama2.align.ppo_recipe import PpoRecipe
from llama2.align.rejection_settings import RejectionRecipe
from llama2.align.reward_recipe import RewardRecipe
from llama2.align.rounds import StageRecipes
from llama2.align.rounds_settings import RoundsRecipe
from llama2.config import ModelConfig
from llama2.data.settings import BuildRecipe
from llama2.errors import RecipeError
from llama2.recipe import Settings
from llama2.train.settings import PretrainRecipe
from llama2.train.sft import SftRecipe

FOLDER = Path(__file__).parents[2] / "recipes"


def kind(path: Path) -> type[Settings]:
    if path.parent.name == "data":
        return BuildRecipe
    if path.stem in (
        kinds := {
            "ppo": PpoRecipe,
            "reject": RejectionRecipe,
            "gatt": GattRecipe,
            "distil": DistilRecipe,
            "rounds": RoundsRecipe,
        }
    ):
        return kinds[path.stem]
    if path.stem.startswith("reward-"):
        return RewardRecipe
    return SftRecipe if path.stem.endswith("-sft") else PretrainRecipe


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.toml")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_every_recipe_loads(path: Path) -> None:
    recipe = recipes.load(path, kind(path))
    if isinstance(recipe, RoundsRecipe):
        StageRecipes.load(recipe, path.parent)
    if isinstance(recipe, PretrainRecipe):
        recipe.model.config(8192, recipe.data.length)
        if recipe.data.recipe:
            recipes.load(path.parent / recipe.data.recipe, BuildRecipe)


def pretraining(name: str) -> PretrainRecipe:
    return recipes.load(FOLDER / f"{name}.toml", PretrainRecipe)


def shape(name: str) -> ModelConfig:
    recipe = pretraining(name)
    return recipe.model.config(8192, recipe.data.length)


@pytest.mark.parametrize(
    ("name", "parameters", "rate"),
    [("7b", 6_738_415_616, 3e-4), ("13b", 13_015_864_320, 3e-4), ("70b", 68_976_648_192, 1.5e-4)],
)
def test_the_papers_numbers(name: str, parameters: int, rate: float) -> None:
    """Spec 1.1 and 3.2."""
    recipe, o = pretraining(name), pretraining(name).optimizer
    assert recipe.model.config(32000, recipe.data.length).parameters() == parameters
    assert (o.lr, o.betas, o.eps, o.weight_decay, o.clip) == (rate, (0.9, 0.95), 1e-5, 0.1, 1.0)
    assert (o.warmup, o.min_lr_ratio, recipe.data.length, recipe.watts) == (2000, 0.1, 4096, 400)
    assert recipe.steps * recipe.batch.size * recipe.data.length == pytest.approx(2e12, rel=1e-6)


def test_small_has_fifteen_million_parameters() -> None:
    # 8192 × 384 + 7 × (4 × 384² + 3 × 384 × 1024 + 2 × 384) + 384, the head being the embeddings
    assert shape("small").parameters() == 15_537_792


def test_ablations_differ_in_what_they_compare_alone() -> None:
    mha, gqa, mqa, context = (pretraining(f"ablations/{name}") for name in ("mha", "gqa", "mqa", "context-4k"))
    assert [recipe.model.n_kv_heads for recipe in (mha, gqa, mqa)] == [8, 2, 1]
    # Half of 6 × 4 × 256² is queries' and outputs'; of the rest a quarter and an eighth stays.
    assert shape("ablations/mha").parameters() == 8192 * 256 + 256 + 6 * (4 * 256**2 + 3 * 256 * 688 + 512)
    assert shape("ablations/gqa").parameters() == 8192 * 256 + 256 + 6 * (2.5 * 256**2 + 3 * 256 * 896 + 512)
    assert shape("ablations/mqa").parameters() == 8192 * 256 + 256 + 6 * (2.25 * 256**2 + 3 * 256 * 912 + 512)
    for other in (gqa, mqa):
        assert other.model_copy(update={"model": mha.model}) == mha
    assert context.model_copy(update={"data": mha.data, "batch": mha.batch}) == mha
    assert context.data.length * context.batch.size == mha.data.length * mha.batch.size
    assert context.data.length * context.data.validation == mha.data.length * mha.data.validation


def test_the_papers_fine_tuning_is_the_default(tmp_path: Path) -> None:
    """Paper 3.1: cosine from 2e-5, decay 0.1, batch 64, rows of 4,096, two epochs."""
    (tmp_path / "x.toml").write_text(
        'start = "m"\n[data]\nfiles = ["d"]\n[optimizer]\nclip = 2.0\n[batch]\nmicro_size = 2\n'
    )
    recipe = recipes.load(tmp_path / "x.toml", SftRecipe)
    o = recipe.optimizer
    assert (o.lr, o.warmup, o.weight_decay, o.clip) == (2e-5, 0, 0.1, 2.0)
    assert (recipe.batch.size, recipe.batch.micro_size, recipe.data.length, recipe.epochs) == (64, 2, 4096, 2)


def test_a_base_is_read_under_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('steps = 1\n[data]\ncorpus = "x"\nlength = 9\n[model]\nsize = "7B"\n')
    (tmp_path / "b.toml").write_text('base = "a.toml"\nseed = 4\n[data]\nlength = 5\n')
    (tmp_path / "c.toml").write_text('base = "b.toml"\nsteps = 2\n')
    recipe = recipes.load(tmp_path / "c.toml", PretrainRecipe, ["data.validation=0", "optimizer.warmup=0"])
    assert (recipe.steps, recipe.seed, recipe.model.size) == (2, 4, "7B")
    assert (str(recipe.data.corpus), recipe.data.length, recipe.data.validation) == ("x", 5, 0)


@pytest.mark.parametrize("base", ['"x.toml"', '"y.toml"', "3"])
def test_a_base_of_itself_is_refused(tmp_path: Path, base: str) -> None:
    (tmp_path / "x.toml").write_text(f"base = {base}")
    (tmp_path / "y.toml").write_text('base = "x.toml"')
    with pytest.raises(RecipeError, match=r"x.toml: base: must be the name of another file that is not based on this"):
        recipes.load(tmp_path / "x.toml", PretrainRecipe)

"""config.yaml: its defaults stand in one place, its mistakes are named all at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cryodrgn_pipeline.config import Config, load_config
from cryodrgn_pipeline.config.check import missing_files
from cryodrgn_pipeline.config.schema import json_schema
from cryodrgn_pipeline.config.template import config_table, config_text, schema_text
from cryodrgn_pipeline.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parents[1]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text))
    return str(caught.value)


def validated_by_snakemake(content: dict) -> dict:
    from snakemake.utils import validate

    validate(content, str(CHECKOUT / "workflows" / "schemas" / "config.schema.yaml"))
    return content


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("workflows/schemas/config.schema.yaml", schema_text()),
        ("config.yaml", config_text()),
    ],
)
def test_generated_files_are_what_the_models_say(path: str, text: str) -> None:
    assert (CHECKOUT / path).read_text(encoding="utf-8") == text, "run `make config`"


def test_the_documentation_lists_every_key() -> None:
    assert config_table() in (CHECKOUT / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_no_meaning_breaks_the_table_it_stands_in() -> None:
    rows = [line for line in config_table().splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert [row for row in rows if row.replace(r"\|", "").count("|") != 4] == []


def test_the_template_is_a_valid_configuration_that_says_nothing_but_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, config_text())) == Config()


def test_a_dataset_is_written_into_the_template_and_read_back(tmp_path: Path) -> None:
    text = config_text({"mine": {"particles": "a b.cs", "passthrough": ["p.cs"]}})
    dataset = load_config(written(tmp_path, text)).datasets["mine"]
    assert (dataset.particles, dataset.passthrough) == ("a b.cs", ["p.cs"])


def test_snakemake_fills_in_every_default_that_the_models_have() -> None:
    given = {"datasets": {"mine": {"particles": "p.star", "subsets": {"few": {"ids": "few.txt"}}}}}
    filled = validated_by_snakemake(given)
    model = Config.model_validate({"datasets": given["datasets"]}).model_dump(by_alias=True)
    for section in ("preprocess", "consensus", "train", "analyze", "volumes", "resources", "pathvars"):
        assert filled[section] == model[section]
    dataset = filled["datasets"]["mine"]
    assert dataset["subsets"]["few"] == model["datasets"]["mine"]["subsets"]["few"]
    assert dataset["conventions"] == model["datasets"]["mine"]["conventions"]
    assert dataset["runs"]["vae"]["subsets"] == ["all"]


def test_an_override_holds_only_what_was_written() -> None:
    runs = {"long": {"train": {"epochs": 50}}}
    filled = validated_by_snakemake({"datasets": {"mine": {"particles": "p.star", "runs": runs}}})
    assert filled["datasets"]["mine"]["runs"]["long"]["train"] == {"epochs": 50}
    assert filled["train"]["epochs"] == 20


def test_the_schema_stands_alone() -> None:
    assert "$ref" not in yaml.safe_dump(json_schema())


def test_all_mistakes_are_named_at_once_with_their_lines(tmp_path: Path) -> None:
    message = refused(
        tmp_path,
        "datasets:\n"
        "  mine:\n"
        "    particls: p.star\n"
        "train:\n"
        "  epochs: many\n"
        "  learning_rate: 1e-4\n"
        "  beta: x\n"
        "preprocess: {box_size_px: 33}\n",
    )
    assert "line 3, datasets.mine.particls: unknown key; did you mean particles?" in message
    assert "line 5, train.epochs: expected a whole number, found 'many'" in message
    assert "line 6, train.learning_rate" in message
    assert "write 1.0e-4" in message
    assert "line 7, train.beta: expected 'auto' or a number, found 'x'" in message
    assert "line 8, preprocess.box_size_px: expected a multiple of 2, found 33" in message


def test_an_unknown_key_unlike_any_other_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    message = refused(tmp_path, "preprocess: {wobble: 1}")
    assert "preprocess.wobble: unknown key; known here: box_size_px, window" in message


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    assert "line 3, train.epochs: stands here twice" in refused(
        tmp_path, "train:\n  epochs: 1\n  epochs: 2\n"
    )


def test_a_bare_off_is_understood(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "consensus: {check: off}")).consensus.check is False


@pytest.mark.parametrize(
    ("subset", "complaint"),
    [
        ("{}", "give either ids (a file) or from_run"),
        ("{ids: a.txt, from_run: vae}", "give either ids (a file) or from_run"),
        ("{ids: a.txt, clusters: [1]}", "belong to from_run"),
        ("{from_run: vae}", "needs a choice"),
        ("{from_run: other, clusters: [1]}", "no run other; there are: vae"),
        ("{from_run: vae, clusters: [1], from_subset: few}", "is not made on few but on: all"),
    ],
)
def test_a_subset_says_where_its_particles_come_from(tmp_path: Path, subset: str, complaint: str) -> None:
    text = f"datasets:\n  mine:\n    particles: p.star\n    subsets:\n      few: {subset}\n"
    message = refused(tmp_path, text)
    assert "line 5, datasets.mine.subsets.few" in message
    assert complaint in message


def test_a_subset_cannot_be_chosen_from_a_run_on_itself(tmp_path: Path) -> None:
    text = (
        "datasets:\n  mine:\n    particles: p.star\n    runs: {vae: {subsets: [few]}}\n"
        "    subsets: {few: {from_run: vae, from_subset: few, clusters: [1]}}\n"
    )
    assert "trained on itself" in refused(tmp_path, text)


@pytest.mark.parametrize("name", ["all", "import", "stack_64", "consensus_128"])
def test_a_subset_cannot_take_a_name_that_the_workflow_uses(tmp_path: Path, name: str) -> None:
    text = f"datasets: {{mine: {{particles: p.star, subsets: {{{name}: {{ids: a.txt}}}}}}}}"
    assert "this name is taken" in refused(tmp_path, text)


def test_a_run_on_an_unknown_subset_is_refused(tmp_path: Path) -> None:
    text = "datasets: {mine: {particles: p.star, runs: {vae: {subsets: [al]}}}}"
    assert "no subset al; there are: all" in refused(tmp_path, text)


def test_names_that_would_not_do_as_folders_are_refused(tmp_path: Path) -> None:
    assert "'a/b' cannot be a name" in refused(tmp_path, "datasets: {a/b: {particles: p.star}}")


@pytest.mark.parametrize("text", ["", "- 1\n", "datasets: [\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "config.yaml" in refused(tmp_path, text)


def test_a_missing_file_is_answered_with_the_verb_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cryodrgn-pipeline init"):
        load_config(tmp_path / "none.yaml")


def test_files_of_the_user_that_do_not_exist_are_listed(tmp_path: Path) -> None:
    (tmp_path / "p.star").touch()
    content = {"particles": "p.star", "mask": "map.mrc", "subsets": {"few": {"ids": "few.txt"}}}
    missing = missing_files(Config.model_validate({"datasets": {"mine": content}}), tmp_path)
    assert [line.split(" in ")[0] for line in missing] == [
        "datasets.mine.mask: no map.mrc",
        "datasets.mine.subsets.few.ids: no few.txt",
    ]


@pytest.mark.parametrize(
    ("dataset", "problem"),
    [
        ("{}", "give either particles (a file) or cryosparc"),
        (
            "{particles: p.cs, cryosparc: {project: P3, job: J4}}",
            "give either particles (a file) or cryosparc",
        ),
        ("{cryosparc: {project: P3}}", "give both, project and job"),
        ("{cryosparc: {project: P3, job: J4}, datadir: d}", "passthrough and datadir belong to particles"),
        ("{cryosparc: {project: P3, job: '42'}}", "expected cryoSPARC's name, such as P3"),
        ("{particles: p.cs, push: {workspace: W1}}", "needs the project and the job"),
        (
            "{cryosparc: {project: P3, job: J4}, push: {project: P5}}",
            "give both, project and job, or neither",
        ),
        ("{particles: p.cs, push: {subsets: [good]}}", "no subset good; there are: none"),
        ("{particles: p.cs, subsets: {cryosparc: {ids: i.txt}}}", "this name is taken"),
    ],
)
def test_what_is_wrong_about_cryosparc_is_named(tmp_path: Path, dataset: str, problem: str) -> None:
    assert problem in refused(tmp_path, f"datasets: {{mine: {dataset}}}")


@pytest.mark.parametrize(
    "dataset",
    [
        "{cryosparc: {project: P3, job: J4}, push: {workspace: W1}}",
        "{particles: p.cs, push: {workspace: W1, project: P3, job: J4}}",
    ],
)
def test_a_job_of_cryosparc_replaces_the_particle_file(tmp_path: Path, dataset: str) -> None:
    assert load_config(written(tmp_path, f"datasets: {{mine: {dataset}}}")).datasets["mine"].push.workspace

"""Steps from a budget, settings of arms, and the paper's own experiments."""

from pathlib import Path

import pytest

from peer_scale.errors import UserError
from peer_scale.experiments.budget import StepCosts, steps_within
from peer_scale.experiments.config import BudgetConfig, merged
from peer_scale.experiments.plan import RunName, make_plan, measured_steps, resolved
from peer_scale.experiments.plan_table import duration, plan_table
from peer_scale.experiments.reading import read_experiment
from peer_scale.experiments.speed import from_rates
from peer_scale.flops import paper_flops
from peer_scale.settings import yaml_text
from peer_scale.settings.presets import find_preset

PAPER = sorted((Path(__file__).resolve().parents[3] / "examples" / "paper").glob("*.yaml"))
# what each arm is in Tables 3 and 4
ROWS = {
    ("table3", "bert"): "BERT-Small",
    ("table3", "electra"): "ELECTRA-Small",
    ("table3", "teams"): "TEAMS-Small",
    ("table3", "peer-212k"): "PEER-Small (212.5K)",
    ("table3", "peer"): "PEER-Small (250K)",
    ("table4", "bert"): "BERT-Base (1M)",
    ("table4", "electra"): "ELECTRA-Base (766K)",
    ("table4", "teams"): "TEAMS-Base (666.9K)",
    ("table4", "peer"): "PEER-Base (666.9K)",
    **{("table5", arm): "PEER-Small (212.5K)" for arm in ("k3", "k4", "k5")},
    **{("table6", arm): "PEER-Small (212.5K)" for arm in ("delta0", "delta3", "delta9")},
    **{("table7", arm): "PEER-Base (666.9K)" for arm in ("delta0", "delta3", "delta9")},
    ("figures2_3", "electra"): "ELECTRA-Small",
    ("figures2_3", "teams"): "TEAMS-Small",
    ("figures2_3", "peer"): "PEER-Small (250K)",
    ("figures4_5", "small"): "PEER-Small (250K)",
    ("figures4_5", "base"): "PEER-Base (666.9K)",
}
ARMS = """
name: x
seeds: [3, 5]
budget: {flops: %s, accounting: %s}
common: {model: {vocab_size: 2048}, training: {seq_length: 64}}
arms:
  - {name: bert, model: bert-tiny}
  - {name: electra, model: electra-tiny, changes: {training: {lr_warmup_iters: 7}}}
  - {name: teams, model: teams-tiny}
  - {name: peer, model: peer-tiny}
  - {name: random, model: peer-tiny, kind: random}
  - {name: tfidf, kind: tfidf}
tasks: [cola]
finetune: {}
"""


def planned(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return make_plan(read_experiment(path), path, None)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    return {
        accounting: planned(tmp_path_factory.mktemp("plan"), ARMS % ("1.0e13", accounting))
        for accounting in ("paper", "actual")
    }


@pytest.mark.parametrize("accounting", ["paper", "actual"])
def test_arms_get_the_budget_to_within_one_of_their_steps(plans, accounting):
    arms = [arm for arm in plans[accounting].arms.values() if arm.steps]
    assert len(arms) == 4
    assert len({arm.steps for arm in arms}) > 2
    for arm in arms:
        a_step = arm.costs.of(accounting)
        assert 1e13 - a_step < arm.steps * a_step <= 1e13


def test_the_whole_decay_lies_within_the_steps(plans):
    for name in ("bert", "electra", "teams", "peer"):
        arm = plans["paper"].arms[name]
        run = resolved(arm.settings_of(3), Path("x"))
        assert (run.training.train_iters, run.seed, run.name) == (arm.steps, 3, f"{name}-tiny")
        expected = 7 if name == "electra" else round(arm.steps * 60 / 600)  # the preset's share, or what is said
        assert run.training.lr_warmup_iters == expected


def test_what_is_learned_makes_the_fingerprint(plans, tmp_path):
    one = plans["paper"].arms
    again = planned(tmp_path, (ARMS % ("1.0e13", "paper")).replace("seeds: [3, 5]", "seeds: [4]"))
    assert {name: arm.fingerprint for name, arm in again.arms.items()} == {
        name: arm.fingerprint for name, arm in one.items()
    }
    assert len({arm.fingerprint for arm in one.values()}) == len(one)
    more = planned(tmp_path, ARMS % ("1.1e13", "paper"))
    trained = ("bert", "electra", "teams", "peer")
    assert all(more.arms[name].fingerprint != one[name].fingerprint for name in trained)
    assert all(more.arms[name].fingerprint == one[name].fingerprint for name in ("random", "tfidf"))
    on_less_memory = ARMS.replace("seq_length: 64", "seq_length: 64, micro_batch_size: 4") % ("1.0e13", "paper")
    assert planned(tmp_path, on_less_memory).arms["peer"].fingerprint == one["peer"].fingerprint


def test_runs_come_seed_by_seed(plans):
    runs = plans["paper"].runs
    assert [run.seed for run in runs] == [3] * 6 + [5] * 5
    assert RunName("tfidf", 5) not in runs


def test_random_weights_are_those_of_step_0(plans):
    run = resolved(plans["paper"].arms["random"].settings_of(3), Path("x"))
    assert (run.training.train_iters, run.training.weight_decay) == (1, 0.0)
    assert run.training.lr < 1e-20  # times anything Adam gives it is nothing beside a weight of 0.02 in fp32


def test_a_budget_that_pays_for_no_step_is_refused():
    costs = StepCosts(tokens=1.0, paper=10.0, actual=20.0)
    assert steps_within(BudgetConfig(flops=99.0, accounting="paper"), costs) == 9
    with pytest.raises(UserError, match="does not pay for one step, which costs 20 FLOPs"):
        steps_within(BudgetConfig(flops=19.0, accounting="actual"), costs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model: {no_such: 1}", "arm bert: unknown key model.no_such"),
        ("training: {lr: fast}", "arm bert: training.lr is fast; it must be a number above 0"),
        ("training: {seq_length: 4096}", "4096"),
        ("objective: {delta: 3}", "arm bert: unknown key objective.delta"),
    ],
)
def test_settings_are_checked_as_the_trainer_does(tmp_path, change, said):
    text = (ARMS % ("1e13", "paper")).replace("bert-tiny}", f"bert-tiny, changes: {{{change}}}}}")
    with pytest.raises(UserError) as error:
        planned(tmp_path, text)
    assert "x.yaml" in str(error.value)
    assert said in str(error.value)


def test_checkpoints_that_are_measured_are_kept(tmp_path):
    assert measured_steps(10, 1) == (10,)
    assert measured_steps(10, 3) == (3, 6, 10)
    assert measured_steps(2, 5) == (1, 2)
    text = (ARMS % ("1e13", "paper")).replace("tasks:", "checkpoints: 5\ntasks:")
    for arm in planned(tmp_path, text).arms.values():
        if arm.steps:
            run = resolved(arm.settings_of(3), Path("x"))
            assert all(step % run.output.keep_every == 0 for step in arm.measured_steps[:-1])
            assert run.output.keep_every % run.output.save_interval == 0


def test_the_table_of_the_plan(plans):
    plan = plans["paper"]
    costs = plan.arms["peer"].costs
    seconds = from_rates(plan, ["1000", f"peer={costs.tokens / 3}"])
    assert seconds["peer"] == pytest.approx(3.0)
    assert seconds["bert"] == pytest.approx(plan.arms["bert"].costs.tokens / 1000)
    table = plan_table(plan, {"peer": 3.0}, finished={RunName("peer", 3)}, jobs=2)
    line = next(line for line in table.splitlines() if line.startswith("peer "))
    steps = plan.arms["peer"].steps
    assert f" {steps:,} " in line
    assert duration(3 * steps) in line
    assert line.endswith("1 of 2")
    assert f"pre-training still to do: {duration(3 * steps)}, 2 at once: {duration(1.5 * steps)}" in table
    assert "the time of 6 runs is not known" in table
    with pytest.raises(UserError, match="no pre-trained arm pear; did you mean peer"):
        from_rates(plan, ["pear=5"])


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_paper_s_experiments_have_the_paper_s_flops(path):
    config = read_experiment(path)
    plan = make_plan(config, path, None)
    names = {name: ROWS[path.stem, name] for name in plan.arms}
    for name, arm in plan.arms.items():
        flops = arm.costs.paper * arm.steps
        assert flops == pytest.approx(paper_flops(names[name]), rel=1e-6)
        printed = config.paper.rows[name].get("train_flops")
        if printed is not None:
            assert flops == pytest.approx(printed, rel=0.005)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_paper_s_numbers_are_of_arms_and_measures_that_there_are(path):
    config = read_experiment(path)
    from peer_scale.experiments.measures import measures

    known = {measure.name for measure in measures(config)} | {"train_flops", "finetune-all/average/std"}
    assert config.paper.rows.keys() - {"ELECTRA-Small++"} == {arm.name for arm in config.arms}
    for row in config.paper.rows.values():
        assert row.keys() <= known
        tasks = [value for name, value in row.items() if name.count("/") == 1 and name.endswith("average") is False]
        if "finetune-all/average" in row:
            of_tasks = [row[f"finetune-all/{task.name}"] for task in config.tasks]
            # printed with two digits, each rounded
            assert row["finetune-all/average"] == pytest.approx(sum(of_tasks) / len(tasks), abs=0.011)


def test_the_paper_s_hyperparameters_are_those_of_table_8():
    for path in PAPER:
        for arm in make_plan(read_experiment(path), path, None).arms.values():
            run = resolved(arm.settings_of(1), path)
            is_small = run.name.endswith("small")
            assert (run.training.seq_length, run.training.global_batch_size) == ((128, 512) if is_small else (512, 256))
            assert run.training.lr_warmup_iters == 10_000
            assert run.training.lr == find_preset(run.name).training.lr
            assert run.masking.mask_fraction == 0.15
            assert yaml_text.load(yaml_text.dump(arm.settings_of(1))) == merged(arm.settings_of(1))

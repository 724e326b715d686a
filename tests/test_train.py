"""Training: the step, one process against two, exact resume, kills, guards, bad input."""
import copy
import csv
import inspect
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SLOW, children, ended, noise_video, refused, torchrun

import data
import eval as ev
import train
from lib import shapes
from lib.weights import read_weights
from tmass import TMASS

SMALL = ["--data", "set/my.csv", "--clip", "tiny", "--frames", 2, "--batch", 4, "--epochs", 2,
         "--workers", 0, "--log-every", 1, "--device", "cpu"]


@pytest.fixture(scope="session")
def videos(tmp_path_factory):
    """36 videos: 26 to train, 5 to validate, 5 to test. -> the folder of set/."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "set").mkdir()
    rows = ["video,caption,split\n"]
    for i in range(36):
        noise_video(folder / f"set/{i}.mp4", i)
        split = {3: "val", 5: "test"}.get(i % 7, "train")
        rows.append(f"{i}.mp4,a video of the number {i},{split}\n")
    (folder / "set/my.csv").write_text("".join(rows))
    return folder


@pytest.fixture
def here(videos, tmp_path, monkeypatch):
    """A working folder of the test's own, with the data set in set/."""
    (tmp_path / "set").symlink_to(videos / "set")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_copy(here, videos):
    """As `here`, but the data set may be spoilt."""
    os.remove("set")
    shutil.copytree(videos / "set", "set")
    return here


# ---- how runs are started and what they leave ----


@pytest.fixture
def stop(call):
    """stop(step, *words) -> what train.py prints until a signal that comes after that step.

    workers_get: a signal to its workers, at the same time.
    """

    def stop(step, *words, number=signal.SIGTERM, workers_get=None):
        def look(*_):  # between any two lines of the program: without torch, and not in itself
            rows = steps(".") if os.path.exists("model.log.csv") else []
            if any(row["step"] == str(step) for row in rows):
                workers = children(os.getpid()) if workers_get else []
                os.kill(os.getpid(), number)
                for pid in workers:
                    os.kill(pid, workers_get)
            else:
                signal.setitimer(signal.ITIMER_REAL, 0.01)

        signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        status, out, err = call(train, *words)
        assert (status, err) == (128 + number, ""), (out, err)
        assert f"stopped by {number.name} after step" in out and out.endswith("--resume\n")
        return out

    yield stop
    signal.setitimer(signal.ITIMER_REAL, 0)


def alone(*words, cwd):
    """Start train.py in a process of its own. -> Popen"""
    return torchrun(ROOT / "train.py", *words, cwd=cwd, processes=1)


def until(job, step):
    """Read what a job prints until it has done a step."""
    assert any(line.startswith(reaches(step)) for line in job.stdout)


def reaches(step):
    return f"step {step:5d}/"


def steps(folder):
    with open(Path(folder) / "model.log.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["loss"]]


def column(folder, name):
    return torch.tensor([float(row[name]) for row in steps(folder)])


def weights(path):
    return read_weights(path)["model"]


def finite(path):
    return all(x.isfinite().all() for x in weights(path).values())


def close(a, b):
    assert a.keys() == b.keys()
    gaps = {k: (a[k] - b[k]).double().norm() for k in a}
    return all(gap <= 1e-4 * b[k].double().norm() + 1e-5 for k, gap in gaps.items())


def check_equal(folder, whole):
    pairs = zip(weights(folder / "model.pt").items(), weights(whole / "model.pt").items())
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    for name in ("step", "loss", "grad_norm"):
        assert torch.equal(column(folder, name), column(whole, name))


def metrics(out):
    return [line for line in out.splitlines() if line.startswith(("validation", "test: "))]


def check_test_again(call, out):
    """The command printed at the end gives the line of the test again."""
    command = shlex.split(out.split("evaluate it again: ")[1])
    assert command[:2] == ["python", "eval.py"]
    status, again, err = call(ev, *command[2:], "--device", "cpu", "--json", "again.json")
    assert status == 0, err
    result = json.loads(Path("again.json").read_text())
    assert metrics(out)[-1] == f"test: {ev.format_metrics(result)}"
    return again


@pytest.fixture
def spoil(monkeypatch):
    """spoil(spoilt): the losses of the calls for which spoilt(number) are NaN."""
    true = TMASS.losses

    def spoil(spoilt):
        numbers = itertools.count(1)

        def losses(self, t, f):
            factor = math.nan if spoilt(next(numbers)) else 1
            return {name: loss * factor for name, loss in true(self, t, f).items()}

        monkeypatch.setattr(TMASS, "losses", losses)

    return spoil


# ---- settings and pure functions of the step ----


def test_learning_rate_by_hand():
    rates = [train.learning_rate(s, 10, 0.2) for s in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)  # half way down the cosine: (6 - 2) / 8
    assert rates[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert train.learning_rate(0, 1, 0.0) == 1  # a single step learns


def batches(seed=1, **share):
    return [*data.Batches(23, 4, 3, seed, **share)]


def test_batches():
    every = batches()
    assert len(every) == data.Batches(23, 4, 3, 1).total == 15  # 5 an epoch, 3 pairs over
    for epoch in range(3):
        pairs = sum(every[5 * epoch:5 * epoch + 5], [])
        assert {e for e, _ in pairs} == {epoch} and len({i for _, i in pairs}) == 20
    assert [i for _, i in every[0]] != [i for _, i in every[5]]  # another order each epoch
    assert every != batches(seed=2)
    assert batches(start=7) == every[7:] and batches(start=15) == []
    shares = [batches(start=2, rank=rank, world=2) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares)] == every[2:]


def test_settings_of_the_method_are_written_once(capsys):
    """TMASS.__init__ has them: recipes name no other, and every one has an option."""
    parameters = inspect.signature(TMASS).parameters
    assert train.METHOD == {k: x.default for k, x in parameters.items() if k != "clip"}
    with pytest.raises(SystemExit):
        train.parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in train.BASE | train.PLACES | train.RUN:
        assert f" --{name.replace('_', '-')} " in text, name
    for name, recipe in train.RECIPES.items():
        assert recipe.keys() <= train.BASE.keys(), name
    assert vars(train.parser().parse_args([])) == {}  # else a default would hide the recipe's


SHAPES = dict(config=dict(data="shapes", root="old", cache="old/frames"), splits={})


@pytest.mark.parametrize("given, saved, name, value", [
    (dict(), None, "pretrain", 300),
    (dict(clip="any.pt"), None, "pretrain", 0),  # loaded weights are not warmed up unasked
    (dict(init="any.pt", pretrain=7), None, "pretrain", 7),
    (dict(data="charades"), None, "head_lr", 1e-5),  # without a recipe of its own
    (dict(radius="none"), None, "support_weight", 0),
    (dict(), SHAPES, "cache", "old/frames"),
    (dict(root="new"), SHAPES, "cache", "new/frames"),  # the old place may be no data set
])
def test_settings(given, saved, name, value):
    args, _ = train.settle(given, saved)
    assert getattr(args, name) == value


# ---- one process against two ----

GRADIENTS = """
import copy, functools, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from clip_model import CLIP
from lib.processes import Gather, Job
from lib.shapes import TINY
from tmass import TMASS

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
objects = [torch.randint(1, 500, (8, 12)), torch.randint(0, 256, (8, 3, 3, 32, 32)).byte()]
dist.broadcast_object_list(objects)
ids, video = objects
for method in (dict(), dict(radius="scaled", support_video="batch", ce_weight=0.5),
               dict(pooling="query", radius="none", support_weight=0.0)):  # has no parameter
    for cut in (4, 5, 1):
        torch.manual_seed(3)
        clip = CLIP(vocab_size=512, **TINY)
        model = TMASS(clip, frames=3, dropout=0.2, prior_std=0.1, **method).train()
        alone = copy.deepcopy(model)
        model.chunk = 7 if cut == 5 else 0
        rows = slice(0, cut) if rank == 0 else slice(cut, 8)
        ddp = DistributedDataParallel(model, static_graph=True)
        torch.manual_seed(5)  # noise and dropout
        gather = functools.partial(Gather.apply, Job(rank, 2), cut != 4)
        out = ddp(ids[rows], video[rows], gather=gather)
        out["loss"].backward()
        two = {k: p.grad for k, p in model.named_parameters()}
        torch.manual_seed(5)
        one = alone(ids, video)
        one["loss"].backward()
        assert abs(out["loss"] - one["loss"]) < 1e-5, (out["loss"], one["loss"])
        total = sum(p.grad.norm() ** 2 for p in alone.parameters()) ** 0.5
        for k, p in alone.named_parameters():
            assert p.grad is not None, k
            gap, size = (p.grad - two[k]).norm(), p.grad.norm()
            # a bias before a softmax has a gradient of rounding errors
            assert gap <= 1e-4 * size + 1e-7 * total, (method, cut, k, gap / size)
        print(f"equal {rank} {cut}", flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """With shares of the same size and others, and with --chunk."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    status, out, err = ended(torchrun(tmp_path / "gradients.py", cwd=tmp_path))
    assert status == 0 and out.count("equal") == 18, err[-3000:]


TRAIN = """
import sys
import train

if __name__ == "__main__":
    sys.exit(train.run(train.main))
"""
UNUSED = """
import torch
from lib import encoders, shapes

class Biased(shapes.CLIP):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.logit_bias = torch.nn.Parameter(torch.tensor(-10.0))

shapes.CLIP = encoders.ENCODERS["clip"] = Biased
"""
BATCHNORM = """
import json
import open_clip

resnet = dict(
    embed_dim=32,
    vision_cfg=dict(layers=[1, 1, 1, 1], width=8, image_size=32),
    text_cfg=dict(context_length=20, vocab_size=49408, width=64, heads=1, layers=1),
)
with open("resnet.json", "w") as file:
    json.dump(resnet, file)
open_clip.add_model_config("resnet.json")
"""


def one_and_two(here, code, *settings, chunk):
    """Train with one and with two processes, in the folders 1 and 2. -> what the two printed"""
    (here / "run.py").write_text(code + TRAIN)
    settings = [*SMALL, "--data", here / "set/my.csv", "--clip-lr", 1e-5, "--head-lr", 1e-4,
                "--epochs", 1, *settings]
    jobs = []
    for count, more in ((1, []), (2, ["--chunk", chunk])):
        (here / str(count)).mkdir()
        command = here / "run.py", *settings, *more
        jobs.append(torchrun(*command, cwd=here / str(count), processes=count))
    (status, one, err), (status2, two, err2) = map(ended, jobs)
    assert (status, status2) == (0, 0), (err, err2[-3000:])
    for name, error in (("loss", 1e-5), ("stochastic", 1e-5), ("ce", 1e-5), ("grad_norm", 1e-3)):
        torch.testing.assert_close(column("2", name), column("1", name), rtol=error, atol=1e-5)
    assert close(weights("2/model.pt"), weights("1/model.pt"))
    assert metrics(one) == metrics(two) and len(metrics(two)) == 2
    assert two.count("given:") == two.count(reaches(1)) == 1  # only rank 0 speaks
    return two


def test_two_processes_train_as_one(own_copy):
    """Also in chunks; where a process's share of a batch has no video that can be read; and where
    an encoder has a parameter that no score depends on, as SigLIP.
    """
    Path("set/1.mp4").write_bytes(b"broken")
    one_and_two(own_copy, UNUSED, "--batch", 2, "--skip-bad", chunk=3)
    for count in "12":
        assert len(steps(count)) == 13
        assert Path(count, "model.bad.txt").read_text().count("1.mp4: ") == 1


@pytest.mark.slow
def test_batch_normalisation_keeps_its_statistics(here, call, monkeypatch):
    """Those of the batch would differ with its share; and from what is tested and saved."""
    pytest.importorskip("open_clip")
    out = one_and_two(here, BATCHNORM, "--batch", 6, "--clip", "open_clip:resnet", chunk=0)
    monkeypatch.chdir("2")
    check_test_again(call, out)


@pytest.mark.slow
def test_nodes_that_find_different_checkpoints(here, one_step):
    """As where each node has a disk of its own."""
    (here / "run.py").write_text("import os\nos.chdir('node' + os.environ['RANK'])\n" + TRAIN)
    for node in range(2):
        (here / f"node{node}").mkdir()
        resumable(one_step, path=f"node{node}/model.pt", step=node + 2)
    _, out, err = ended(torchrun(here / "run.py", "--resume", "--device", "cpu", cwd=here))
    errors = {line for line in err.splitlines() if line.startswith("error: ")}
    assert len(errors) == 1 and "different checkpoints in --out model.pt" in errors.pop()
    assert "train.py" not in err and "step" not in out  # no stack


# ---- stop and resume ----

RESUMABLE = [*SMALL, "--workers", 2, "--epochs", 3, "--save-every", 4, "--clip-lr", 5e-4,
             "--head-lr", 1e-3]
GO_ON = ["--resume", "--workers", 2, "--log-every", 1, "--save-every", 4]  # the rest is in model.pt


@pytest.fixture(scope="session")
def uninterrupted(videos, run, tmp_path_factory):
    """-> (folder, stdout) of a run of 18 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "set").symlink_to(videos / "set")
    return folder, run("train.py", *RESUMABLE, cwd=folder).stdout


@pytest.fixture(scope="session")
def one_step(videos, tmp_path_factory):
    """What an unfinished run holds."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "set").symlink_to(videos / "set")
    job = alone(*SMALL, "--epochs", 300, cwd=folder)
    until(job, 2)
    job.send_signal(signal.SIGTERM)
    assert ended(job)[0] == 128 + signal.SIGTERM
    return folder / "model.pt"


def resumable(source, path="model.pt", step=None, **settings):
    """Make model.pt a run that ends after an epoch, with other settings. -> what it holds."""
    content = copy.deepcopy(read_weights(source))
    content["config"] |= dict(epochs=1) | settings
    content["step"] = step or content["step"]
    torch.save(content, path)
    return content


def test_an_uninterrupted_run(uninterrupted, call, monkeypatch):
    folder, out = uninterrupted
    monkeypatch.chdir(folder)
    content = read_weights("model.pt")
    assert content["finished"] and content["step"] == 18 and "optimizer" not in content
    assert column(".", "step").tolist() == [*range(1, 19)]
    best = content["best"][0]
    assert best < 14  # so that what is resumed at 14, below, is not the best
    assert f"the result is that of step {best}, the best on the validation split" in out
    assert "test: t2v R@1" in out and "checkpoint: model.pt" in out
    before = Path("model.pt").read_bytes()
    assert "is finished (step 18): nothing to resume" in call(train, "--resume")[1]
    assert before == Path("model.pt").read_bytes()
    words = "--split", "val", "--workers", 0, "--device", "cpu", "--json", "val.json"
    assert call(ev, *words)[0] == 0
    line = ev.format_metrics(json.loads(Path("val.json").read_text()))
    assert [line in epoch for epoch in metrics(out)[:3]] == [k == best for k in (6, 12, 18)]


@pytest.mark.parametrize("number, step, workers_get", [
    (signal.SIGTERM, 8, None),
    (signal.SIGHUP, 14, None),
    (signal.SIGTERM, 6, signal.SIGTERM),  # in validation, from a batch system
    (signal.SIGINT, 2, signal.SIGKILL),  # they are no bad videos
])
def test_resume_is_exact(here, call, stop, uninterrupted, number, step, workers_get):
    stop(step, *RESUMABLE, number=number, workers_get=workers_get)
    # A validation that is not over is repeated, from the save before it.
    assert 0 < read_weights("model.pt")["step"] < 18
    assert call(train, *GO_ON)[0] == 0
    check_equal(here, uninterrupted[0])


@pytest.mark.slow
@pytest.mark.parametrize("slow", [False, True])
def test_sigterm_under_torchrun(here, slow):
    """slow: no batch arrives. One process waits for its workers, and the other for that process."""
    (here / "run.py").write_text(SLOW + TRAIN)
    words = [*SMALL, "--workers", 2, "--epochs", 2000, "--save-every", 10_000, "--batch", 2]
    job = torchrun(here / "run.py", *words, cwd=here)
    try:
        until(job, 3)
        if slow:
            (here / "slow").touch()
            time.sleep(3)
        job.send_signal(signal.SIGTERM)
    finally:
        _, out, err = ended(job, timeout=40)
    step = read_weights("model.pt")["step"]
    assert step >= 3 and out.count(f"stopped by SIGTERM after step {step};") == 1, (out, err)
    assert "error: " not in err


@pytest.mark.parametrize("moment, number", [
    pytest.param("rendering", signal.SIGTERM, marks=pytest.mark.slow),
    ("warm-up", signal.SIGINT),
    pytest.param("warm-up", signal.SIGHUP, marks=pytest.mark.slow),
])
def test_a_signal_before_the_first_step(tmp_path, moment, number):
    if moment == "warm-up":
        shapes.render_shapes(tmp_path / "made", train=16, val=0, test=0)
    job = alone("--root", "made", "--workers", 2, "--pretrain", 100_000, cwd=tmp_path)
    assert moment == "rendering" or any("amp off" in line for line in job.stdout)
    while job.poll() is None and len(children(job.pid)) < 2:
        time.sleep(0.01)
    job.send_signal(number)
    status, _, err = ended(job)
    assert status == 128 + number and "nothing was saved" in err and "Traceback" not in err
    assert not [*tmp_path.glob("model*")]


@pytest.mark.slow
@pytest.mark.parametrize("k", range(6))
def test_kill_at_random_moments(here, call, uninterrupted, k):
    words = [*RESUMABLE, "--save-every", 1, "--resume"]  # --resume without a checkpoint starts
    job = alone(*words, cwd=here)
    until(job, random.randint(1, 15))
    while k % 2 and job.poll() is None and not [*here.glob("model.pt*.part")]:  # while saving
        time.sleep(0.001)
    job.kill()
    ended(job)
    assert call(train, *words)[0] == 0
    check_equal(here, uninterrupted[0])


def test_a_run_is_its_data(own_copy, call, one_step):
    """It goes on with the same data at another place, and with no other."""
    os.rename("set", "moved")
    elsewhere = "--resume", "--device", "cpu", "--data", "moved/my.csv"
    table = Path("moved/my.csv").read_text()
    for before, after in (("number 1,", "number 99,"), (",test", ",train"), ("10,val", "0,val")):
        resumable(one_step)
        Path("moved/my.csv").write_text(table.replace(before, after))
        kept = Path("model.pt").read_bytes()
        refused(call(train, *elsewhere), "model.pt", "split than this", "--data")
        assert Path("model.pt").read_bytes() == kept
    Path("moved/my.csv").write_text(table)
    resumable(one_step)
    assert call(train, *elsewhere)[0] == 0
    assert read_weights("model.pt")["config"]["root"] == str(own_copy / "moved")


def moments(content):
    content["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def not_finite(content):
    content["model"]["pool.q.weight"][0] = math.nan


@pytest.mark.parametrize("forge", [
    lambda c: c.update(step="1.5"),
    lambda c: c.pop("optimizer"),
    moments,
    not_finite,
])
def test_damaged_runs_are_not_resumed(here, call, one_step, forge):
    content = resumable(one_step)
    forge(content)
    torch.save(content, "model.pt")
    before = Path("model.pt").read_bytes()
    refused(call(train, "--resume", "--workers", 0, "--device", "cpu"), "model")
    assert Path("model.pt").read_bytes() == before


def test_a_run_goes_on_with_what_is_whole_of_its_log(here, call, one_step):
    whole = one_step.with_name("model.log.csv").read_text()
    head, row, *_ = whole.splitlines()
    cut = f"step,gone\nx{row}\n,\n\0\n{row}"
    for before, after in ((whole, cut), ("", "other,columns\n1,2\n")):
        resumable(one_step)
        Path("model.log.csv").write_text(before + after)
        assert call(train, "--resume", "--device", "cpu")[0] == 0
        lines = Path("model.log.csv").read_text().splitlines()
        assert lines[:len(before.splitlines())] == before.splitlines()
        assert lines[0] == head and steps(".") and not {"x" + row, "1,2"} & {*lines}


def test_one_run_per_out_at_a_time(here, call, stop):
    """Its log tells; model.bin would have the same."""
    long = [*SMALL, "--epochs", 300]
    job = alone(*long, "--workers", 1, "--save-every", 1, cwd=here)
    until(job, 3)
    for flags in ((), ("--resume",), ("--overwrite",), ("--out", "model.bin")):
        refused(call(train, *long, *flags), "another run writes model.")
    assert job.poll() is None and not os.path.exists("model.bin")
    job.kill()  # its worker lives on for some seconds, and the lock does not
    job.wait()
    stop(read_weights("model.pt")["step"] + 20, *long, "--resume")


# ---- guards ----


def test_ten_steps_that_are_not_finite_stop(here, call, spoil):
    """One is skipped. What is advised then works."""
    spoil(lambda step: step == 2 or 4 < step <= 14)
    status, out, err = call(train, *SMALL, "--epochs", 3, "--save-every", 1)
    refused((status, out, err), "10 steps in a row, to 14, were not finite: model.pt keeps")
    assert "step 2: loss or gradient is not finite; step skipped (1 in a row)" in out
    assert out.count("step skipped") == 11 and finite("model.pt")
    advice = shlex.split(err.split("lower rates: ")[1])
    assert advice[:3] == ["--init", "model.pt", "--out"]
    assert call(train, *SMALL, *advice)[0] == 0


def test_a_run_that_diverges_is_not_saved(here, call):
    diverging = ["--epochs", 20, "--head-lr", 10, "--weight-decay", 0, "--warmup", 0]
    refused(call(train, *SMALL, *diverging), "scores are not finite numbers")
    assert finite("model.pt")


def test_bad_videos(own_copy, call):
    """Each is named once, whether it is missing or broken, and of whatever split."""
    for i in (1, 3, 5):  # of train, val and test
        Path(f"set/{i}.mp4").write_bytes(b"broken")
    refused(call(train, *SMALL), "1.mp4")
    os.remove("set/2.mp4")
    refused(call(train, *SMALL), "2.mp4", "row 4", "--skip-bad")
    status, out, err = call(train, *SMALL, "--skip-bad")
    assert status == 0 and not err and "--skip-bad: 1 missing videos left out" in out
    assert "4 videos left out, listed in model.bad.txt" in out
    lines = Path("model.bad.txt").read_text().splitlines()
    assert sorted(re.match(f"{own_copy}/set/(.*?).mp4", line)[1] for line in lines) == [*"1235"]
    for i in range(3, 36, 7):
        os.unlink(f"set/{i}.mp4")
    status, out, err = call(train, *SMALL, "--epochs", 0, "--skip-bad", "--out", "none.pt")
    assert status == 0 and "val: all 5 videos are missing" in out, err
    assert "no step: the starting point is the result" in out


# ---- what the options do ----


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_resumes_exactly(here, call, stop, amp):
    words = [*SMALL, "--epochs", 1, "--clip-lr", 1e-4, "--head-lr", 1e-3, "--save-every", 1]
    for name, precision in (("plain", "off"), ("whole", amp)):
        status, out, _ = call(train, *words, "--amp", precision, "--out", f"{name}/model.pt")
        assert status == 0 and f"on cpu, amp {precision}" in out and "skipped" not in out
    halved, plain = (column(name, "loss") for name in ("whole", "plain"))
    assert not torch.equal(halved, plain) and torch.allclose(halved, plain, rtol=0.1)
    stop(2, *words, "--amp", amp)
    stop(4, "--resume", "--log-every", 1)
    content = read_weights("model.pt")
    if amp == "fp16":
        assert content["scaler"]["_growth_tracker"] == content["step"]
    assert call(train, "--resume", "--log-every", 1)[0] == 0
    check_equal(here, here / "whole")


def test_float16_seeks_its_scale_but_not_for_ever(here, call, spoil):
    spoil(lambda step: step <= 12)
    status, out, err = call(train, *SMALL, "--amp", "fp16", "--epochs", 3)
    assert status == 0 and out.count("step skipped") == 12 and finite("model.pt"), err
    spoil(lambda step: True)
    result = call(train, *SMALL, "--amp", "fp16", "--epochs", 6, "--out", "nan.pt")
    refused(result, "30 steps in a row, to 30, were not finite", "--amp bf16")


def test_the_command_printed_gives_the_line_printed(own_copy, call):
    """With videos that lie elsewhere, are missing or broken, and frames from a cache."""
    shutil.copy("set/my.csv", "my.csv")
    os.remove("set/5.mp4")  # of the test split
    Path("set/12.mp4").write_bytes(b"broken")
    os.rename("set", "films")
    words = ["--data", "my.csv", "--videos", "films", "--skip-bad", "--cache", "my frames",
             "--epochs", 1, "--out", "a model.pt"]
    status, out, err = call(train, *SMALL, *words)
    assert status == 0, err
    config = read_weights("a model.pt")["config"]
    assert (config["root"], config["videos"]) == (str(own_copy), str(own_copy / "films"))
    assert "is gone" not in check_test_again(call, out)
    # What is in the cache is not decoded again.
    for path in Path("films").glob("[13]?.mp4"):
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    status, again, err = call(train, *SMALL, *words, "--overwrite")
    assert status == 0 and metrics(again) == metrics(out)
    shutil.rmtree("my frames")
    status, printed, err = call(ev, "--ckpt", "a model.pt", "--skip-bad", "--workers", 0)
    assert "my frames, where training kept its frames, is gone" in printed


def test_init_and_the_baseline(here, call):
    assert call(train, *SMALL, "--radius", "none", "--epochs", 1)[0] == 0
    content = read_weights("model.pt")
    first = steps(".")[0]
    assert float(first["loss"]) == pytest.approx(float(first["ce"]))  # no mass: X-Pool's loss
    status, out, _ = call(train, *SMALL, "--init", "model.pt", "--epochs", 0, "--out", "grown.pt")
    assert status == 0 and "starting anew: radius (LinearRadius)" in out
    grown = weights("grown.pt")
    assert all(torch.equal(x, grown[k]) for k, x in content["model"].items())
    grown_to = "--init", "grown.pt", "--out", "x.pt"
    refused(call(train, *SMALL, *grown_to, "--heads", 4), "grown.pt has 1 heads", "--heads 1")
    assert not os.path.exists("x.pt")
    for option, value, anew in (("--frames", 3, "radius (LinearRadius)"),
                                ("--pooling", "mean", "pool (MeanPool)")):
        _, out, _ = call(train, *SMALL, *grown_to, "--epochs", 0, option, value, "--overwrite")
        assert f"starting anew: {anew}\n" in out
    assert torch.equal(weights("x.pt")["radius.linear.weight"], grown["radius.linear.weight"])
    clip_of = "--clip", "grown.pt", "--epochs", 0, "--out", "clip.pt"  # its CLIP and tokenizer only
    assert call(train, *SMALL, *clip_of)[0] == 0
    assert read_weights("clip.pt")["merges"] == content["merges"]
    assert torch.equal(weights("clip.pt")["clip.text_projection"], grown["clip.text_projection"])


def test_a_frozen_clip_stays_as_it_is(here, call):
    assert call(train, *SMALL, "--epochs", 0, "--out", "start.pt")[0] == 0
    status, out, _ = call(train, *SMALL, "--freeze-clip", "--epochs", 1)
    assert status == 0 and "CLIP 0 parameters" in out
    before = weights("start.pt")
    after = weights("model.pt")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert "pool.linear.weight" in moved and not any(name.startswith("clip.") for name in moved)


def test_the_scale_of_the_logits_stays_below_100(here, call, one_step):
    content = read_weights(one_step)
    content["model"]["clip.logit_scale"].fill_(5)
    torch.save(content, "steep.pt")
    assert call(train, *SMALL, "--init", "steep.pt", "--epochs", 1)[0] == 0
    assert column(".", "scale").max() <= 100.001


def test_tensorboard(here, call, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert call(train, *SMALL, "--epochs", 1, "--tensorboard", "curves")[0] == 0
    points = [point.value for point in EventAccumulator("curves").Reload().Scalars("loss")]
    torch.testing.assert_close(torch.tensor(points), column(".", "loss"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # its import fails
    again = "--overwrite", "--tensorboard", "curves"
    refused(call(train, *SMALL, *again), "pip install tensorboard")


# ---- what is refused ----

REFUSED = {  # command -> what must be in the line
    "--head-lr nan": "argument --head-lr",
    "--prior-std 1e30": "argument --prior-std",
    "--seed -1": "argument --seed",
    "--pretrain 1e3": "argument --pretrain",
    "--batch 1": "argument --batch",
    "--frames 1000000000": "argument --frames",
    "--workers 1000000": "argument --workers",
    "--epoch 3": "--epoch 3",
    "--heads 3": "heads=3",
    "--batch 27": "my.csv: 26 training pairs are too few for a batch of 27: lower --batch",
    "--pretrain 5": "--pretrain",
    "--freeze-clip --pooling query --radius none": "--freeze-clip leaves nothing to train",
    "--data nothing": "unknown data set 'nothing'",
    "--data msrvtt --root folder": "MSRVTT_train.9k.csv",
    "--root folder": "26 of 26 videos are missing",
    "--clip ViT-B/99": "ViT-B/99",
    "--clip other.pt": "other.pt",
    "--init absent.pt": "absent.pt",
    "--init done.pt --out folder/../done.pt --overwrite": "is what --clip or --init starts from",
    "--device gpu": "--device gpu",
    "--out folder": "--out folder cannot be written: give a plain file's name",
    "--out file/model.pt": "file/model.pt",
    "--out pipe.pt": "pipe.pt",
    "--out /dev/null": "/dev/null",
    "--out file": "file is not a checkpoint of this program",
    "--out file --overwrite": "file is not a checkpoint of this program",
    "--out link.pt --overwrite": "link.pt is not a checkpoint of this program",
    "--out empty.pt": "empty.pt",
    "--out other.pt --overwrite": "other.pt is not a checkpoint of this program",
    "--out other.pt --resume": "other.pt is not a checkpoint of this program",
    "--out cut.pt --resume": "cut.pt",
    "--out done.pt": "done.pt holds a finished run",
    "--out lost.pt": "lost.log.csv belongs to another run, whose lost.pt is gone",
    "--out going.pt": "going.pt holds an unfinished run at step",
    "--out going.pt --overwrite": "going.pt holds an unfinished run at step",
    "--out going.pt --resume": "--epochs 2 differs from 1 in the run",
}


def test_mistakes_are_one_line(here, call, run, one_step):
    """And cost nothing: what was there stays as it was, and nothing new is there."""
    assert call(train, *SMALL, "--epochs", 0, "--out", "done.pt")[0] == 0
    resumable(one_step, "going.pt")
    Path("cut.pt").write_bytes(one_step.read_bytes()[:-5000])
    Path("file").write_text("of mine")
    Path("empty.pt").touch()
    Path("lost.log.csv").write_text("step\n1\n")
    torch.save({"some.weight": torch.ones(2)}, "other.pt")
    os.symlink("file", "link.pt")
    os.mkfifo("pipe.pt")
    os.mkdir("folder")

    def content():
        return {x: x.is_file() and x.read_bytes() for x in here.rglob("*")}

    before = content()
    for words, reason in REFUSED.items():
        refused(call(train, *SMALL, *words.split()), reason)
    assert content() == before
    result = run("train.py", *SMALL, "--radius", "square", timeout=60)  # the command itself, once
    refused((result.returncode, result.stdout, result.stderr), "'square'")
    assert call(train, *SMALL, "--epochs", 1, "--overwrite", "--out", "done.pt")[0] == 0
    assert read_weights("done.pt")["step"] == 6

"""Shared by all tests: our modules on sys.path, real annotation files where there are any, small
models, the paper in plain loops, and how our programs are run.
"""
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
sys.path.extend([str(ROOT), str(ROOT / "study")])
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes started here
torch.set_num_threads(1)  # threads that share so little work mostly wait for each other
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, programs would ignore it

from clip_model import CLIP, Tokenizer  # noqa: E402
from lib.processes import run as run_program  # noqa: E402
from lib.weights import save_checkpoint  # noqa: E402
from tmass import TMASS  # noqa: E402

with contextlib.suppress(ImportError):  # optional; torch.hub shows downloads with it
    from tqdm import tqdm

    # Its monitor is a thread that never ends, and workers are not forked beside other threads.
    tqdm.monitor_interval = 0


@pytest.fixture(scope="session")
def shared():
    """Real annotation files and CLIP's vocabulary, beside the project; not ours, so tests pass
    without them.
    """
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data")
    return folder


# ---- small models ----

D = 64
T = 4


def small_clip(width=D):
    return CLIP(embed_dim=width, image_size=16, patch_size=8, vision_width=64, vision_layers=1,
                context_length=16, vocab_size=514, text_width=64, text_layers=1)


def small_model(seed=0, shake=0.1, **method):
    """A small model whose head has left its identity start, so that no term hides behind a zero."""
    torch.manual_seed(seed)
    model = TMASS(small_clip(), **{"frames": T, **method}).eval()
    for name, p in model.named_parameters():
        if not name.startswith("clip."):
            p.data += shake * torch.randn_like(p)
    return model


def features(N, V, seed=1, frames=T):
    """Texts t (N,D), and videos f (V,T,D) whose frames have something in common."""
    g = torch.Generator().manual_seed(seed)
    t = torch.randn(N, D, generator=g)
    v = torch.randn(V, 1, D, generator=g)
    return t, v + 0.7 * torch.randn(V, frames, D, generator=g)


def noise_video(path, seed):
    """Write six frames of large squares of random colours."""
    from videos import write_video

    g = torch.Generator().manual_seed(seed)
    frames = F.interpolate(torch.rand(6, 3, 4, 4, generator=g), size=(32, 48)) * 255
    write_video(path, frames.permute(0, 2, 3, 1).byte().contiguous())


# ---- the paper once more, in plain loops ----


def layer_norm(x, ln):
    return (x - x.mean()) / (x.var(unbiased=False) + ln.eps).sqrt() * ln.weight + ln.bias


def cos(a, b):
    return a @ b / (a.norm() * b.norm())


def attend(logits, values):
    e = [x.exp() for x in logits]
    return sum(w * x for w, x in zip(e, values)) / sum(e)


def literal_pool(model, t, f):
    """psi(f | t) of one text t (D) and one video f (T,D)."""
    if model.config["pooling"] == "mean":
        return sum(f) / len(f)
    if model.config["pooling"] == "query":
        return attend([cos(t, x) / 0.1 for x in f], [x / x.norm() for x in f])
    p = model.pool
    H = model.config["heads"]
    d = len(t) // H
    q = p.q.weight @ layer_norm(t, p.ln1) + p.q.bias
    k = [p.k.weight @ layer_norm(x, p.ln1) + p.k.bias for x in f]
    u = [p.v.weight @ layer_norm(x, p.ln1) + p.v.bias for x in f]
    heads = []
    for h in range(H):
        part = slice(h * d, (h + 1) * d)
        logits = [q[part] @ x[part] / d ** 0.5 for x in k]
        heads.append(attend(logits, [x[part] for x in u]))
    o = p.out.weight @ torch.cat(heads) + p.out.bias
    x = layer_norm(o, p.ln2)
    return layer_norm(x + p.linear.weight @ x + p.linear.bias, p.ln3)


def literal_radius(model, S):
    """R of one pair. S (T) -> (D)."""
    kind = model.config["radius"]
    if kind == "linear":
        return torch.exp(model.radius.linear.weight @ S + model.radius.linear.bias)
    theta = model.radius.theta if kind == "scaled" else 1
    R = torch.exp(theta * sum(S) / len(S))
    return R.expand(D) * (kind != "none")


@torch.no_grad()
def literal_score(model, t, f, trials, seed=24):
    """max_m cos(t_i + R_ij ε_m, v_ij), one pair and one sample at a time."""
    eps = model.noise(trials, seed) if trials else torch.zeros(1, t.shape[1])
    sims = torch.empty(len(t), len(f))
    for i in range(len(t)):
        for j in range(len(f)):
            v = literal_pool(model, t[i], f[j])
            R = literal_radius(model, torch.stack([cos(t[i], x) for x in f[j]]))
            sims[i, j] = max(cos(t[i] + R * e, v) for e in eps)
    return sims


# ---- programs ----


@pytest.fixture
def call(capsys):
    """call(train, "--epochs", 1) -> (exit status, stdout, stderr): a command in this process."""

    def call(program, *words):
        capsys.readouterr()
        words = [*map(str, words)]
        try:
            status = run_program(lambda: program.main(words))
        except SystemExit as end:  # argparse
            status = end.code
        return status, *capsys.readouterr()

    return call


def refused(result, *words):
    """A mistake costs one line that says what it is, and status 2. result: (status, out, err)."""
    status, out, err = result
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, result
    assert all(word in err for word in words), (words, err)


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory):
    """The path of a small model's checkpoint."""
    path = tmp_path_factory.mktemp("ckpt") / "model.pt"
    save_checkpoint(path, small_model(), Tokenizer((), 16), {})
    return path


@pytest.fixture
def ask(call, ckpt):
    """ask("a dog", "--videos", DIR) -> what search.py prints on standard output, and on error."""
    import search

    def ask(*words, expect=0, ckpt=ckpt):
        words = [*words, "--ckpt", ckpt, "--workers", 0, "--device", "cpu"]
        status, out, err = call(search, *words)
        assert status == expect, (out, err)
        return out, err

    return ask


def forked(*words, log=2, **env):
    """Run search.py in a copy of this process, which saves the time of starting one. -> its pid

    log: the file, or its number, for what it prints.
    """
    import search

    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        signal.alarm(200)  # nothing waits for it for ever
        os.environ.update(env)
        sys.stdout = sys.stderr = open(log, "w", buffering=1)
        status = run_program(lambda: search.main([*map(str, words)]))
    finally:
        os._exit(status)


def status_of(pid):
    """The exit status of a process, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="session")
def run():
    """run("train.py", "--epochs", 1, cwd=...) -> CompletedProcess with text output; the test
    judges the return code.
    """

    def run(script, *args, cwd=None, env=None, timeout=300, stdin=None):
        program = [str(ROOT / script)]
        env = {**os.environ, **(env or {})}
        if script.startswith("lib/"):  # a module of the package
            program = ["-m", script.removesuffix(".py").replace("/", ".")]
            env["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, *program, *map(str, args)]
        return subprocess.run(
            command, cwd=cwd, env=env, timeout=timeout, input=stdin, capture_output=True, text=True
        )

    return run


def free_port():
    """A port that is free, and stays so: none of those that systems give whoever asks for any."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return str(port)


def torchrun(*command, cwd, processes=2):
    """Start a program in several processes, or in one without torchrun. -> Popen, pipes of text"""
    words = [sys.executable, *map(str, command)]
    if processes > 1:
        options = ["--nproc_per_node", str(processes), "--master_port", free_port()]
        words[1:1] = ["-m", "torch.distributed.run", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(words, cwd=cwd, env=env, **pipes)


def ended(job, timeout=150):
    """What a Popen printed, once it has ended. -> (exit status, stdout, stderr)"""
    try:
        out, err = job.communicate(timeout=timeout)
    finally:
        job.kill()
    return job.returncode, out, err


def children(pid):
    """The processes that a process has started and that are still there."""
    lists = [task.read_text() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    return sorted(map(int, " ".join(lists).split()))


# Code for a program whose videos can't be opened once there is a file "slow": in a job, those of
# process 1 alone.
SLOW = """
import os
import time

import av

plain = av.open

def slowly(*arguments, **options):
    if os.path.exists("slow"):  # as on a network disk that does not answer
        time.sleep(60)
    return plain(*arguments, **options)

if os.environ.get("RANK", "1") == "1":
    av.open = slowly
"""


BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)


@pytest.fixture
def soon():
    """A test may take 20 seconds, on a busy machine; then an exception ends it."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---- CLIP's vocabulary, and weights as others keep them ----


@pytest.fixture(scope="session")
def vocabulary(shared, tmp_path_factory):
    """A cache folder, with CLIP's vocabulary where a download would have put it."""
    folder = tmp_path_factory.mktemp("cache")
    shutil.copy(shared / "clip" / "bpe_simple_vocab_16e6.txt.gz", folder)
    return folder


@pytest.fixture
def cache(vocabulary, monkeypatch):
    monkeypatch.setenv("TMASS_CACHE", str(vocabulary))
    return vocabulary


def shaken(model):
    """Random biases and norms: they start at 0 and 1, where a mistake in names does not show."""
    for p in model.parameters():
        if p.ndim == 1:
            p.data += 0.05 * torch.randn_like(p)
    return model.eval()


def hf_clip(tokens=49408, vision=None, text=None):
    """A small CLIPModel of transformers. vision, text: settings beyond its size."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=1)
    vision = dict(size, image_size=32, patch_size=16) | (vision or {})
    text = dict(size, vocab_size=tokens, eos_token_id=tokens - 1) | (text or {})
    config = transformers.CLIPConfig(text, vision, projection_dim=D)
    return shaken(transformers.CLIPModel(config))


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """A file as the released code writes it: CLIP, pool_frames, stochastic; random weights.

    -> (path, state dict, transformers' CLIPModel)
    """
    hf = hf_clip()
    state = {f"clip.{key}": x for key, x in hf.state_dict().items()}
    layers = [f"cross_attn.{name}_proj" for name in ("q", "k", "v", "out")]
    for name in (*layers, "linear_proj"):
        state[f"pool_frames.{name}.weight"] = torch.eye(D) + 0.1 * torch.randn(D, D)
        state[f"pool_frames.{name}.bias"] = 0.1 * torch.randn(D)
    for name in ("layer_norm1", "layer_norm2", "layer_norm3"):
        state[f"pool_frames.{name}.weight"] = 1 + 0.1 * torch.randn(D)
        state[f"pool_frames.{name}.bias"] = 0.1 * torch.randn(D)
    branch = "stochastic.std_branch"
    state[f"{branch}.linear_proj.weight"] = 0.3 * torch.randn(D, 12)
    state[f"{branch}.linear_proj.bias"] = 0.1 * torch.randn(D)
    state[f"{branch}.learnable_scalar"] = torch.tensor([torch.nan])  # uninitialised there
    path = tmp_path_factory.mktemp("released") / "model_best.pth"
    torch.save(dict(epoch=5, state_dict=state, optimizer={"param_groups": []}), path)
    return path, state, hf

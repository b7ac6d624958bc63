"""The CPU backend against the reference: outputs and every gradient by name, in memory that starts out as NaN."""

import _thread
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import pytest
import torch
from doors import cpu, reference

from moemamba import ops
from moemamba.layers import Router
from moemamba.ops.experts import ACTIVATIONS, GATED
from moemamba.ops.head import cpu as cpu_cross_entropy
from moemamba.ops.kit import cpu as kit

cpu_kernel = sys.modules["moemamba.ops.kit.cpu.run"]  # `run` is a function of the package too
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` is filled with NaN, so that whatever a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def packed(batch, length):
    """Rows of sequences of all lengths with padding before, between and inside them; one row is nothing but padding."""
    seq_idx = (torch.rand(batch, length) < 0.1).cumsum(1)
    seq_idx[torch.rand(batch, length) < 0.2] = -1
    seq_idx[0] = -1
    return seq_idx.int()


def scan_inputs(batch=2, length=100, width=70, n=16, dtype=torch.float32):
    """As a Mamba layer makes them: u and z halves of one tensor, dt, B and C slices of others."""
    torch.manual_seed(0)
    u, z = torch.randn(batch, length, 2 * width, dtype=dtype).chunk(2, dim=-1)
    B, C = torch.randn(batch, length, 3 + 2 * n, dtype=dtype)[..., 3:].chunk(2, dim=-1)
    dt = torch.randn(batch, length, width + 1, dtype=dtype)[..., 1:] - 2
    A, D, dt_bias = -torch.rand(width, n) * 8 - 0.1, torch.randn(width), torch.randn(width) / 2
    return {"u": u, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": True} | {
        "initial_state": torch.randn(batch, width, n),
        "seq_idx": None,
    }


def conv_inputs(batch=2, length=100, width=70, k=4, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(batch, length, 2 * width, dtype=dtype).chunk(2, dim=-1)[0]
    return {"x": x, "weight": torch.randn(width, k), "bias": torch.randn(width), "activation": "silu"} | {
        "initial_state": torch.randn(batch, width, k - 1, dtype=dtype),
        "seq_idx": None,
    }


def choices(tokens, top_k, n_experts, kind):
    """Indices (t, k) of one kind; `n_experts` where a choice was dropped."""
    torch.manual_seed(2)
    indices = torch.rand(tokens, n_experts).topk(top_k).indices
    if kind == "empty experts":
        indices = indices.clamp(max=n_experts // 2)
    elif kind == "one hot expert":
        indices[:] = 1
    elif kind == "dropped":
        indices[torch.rand(tokens, top_k) < 0.4] = n_experts
        indices[: tokens // 4] = n_experts
    return indices


def expert_inputs(kind="any", tokens=50, top_k=2, activation="relu", dtype=torch.float32):
    indices = choices(tokens, top_k, 5, kind)
    hidden = 48 if activation in GATED else 24
    return {
        "x": torch.randn(tokens, 17, dtype=dtype),
        "indices": indices,
        "gates": torch.rand(tokens, top_k),
        "up": torch.randn(5, hidden, 17) / 4,
        "down": torch.randn(5, 13, 24) / 4,
        "activation": activation,
    }


def outputs_and_gradients(op, inputs):
    # A view stays a view, so that the layout reaches the kernel.
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if is_float(t)}
    results = op(*(inputs | leaves).values())
    results = {"y": results} if isinstance(results, torch.Tensor) else dict(zip(("y", "final"), results, strict=True))
    generator = torch.Generator().manual_seed(1)
    loss = sum((r.float() * torch.randn(r.shape, generator=generator)).sum() for r in results.values())
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return results | {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}


def is_float(argument):
    return isinstance(argument, torch.Tensor) and argument.is_floating_point()


def assert_same_as_reference(name, inputs, tolerance):
    expected = outputs_and_gradients(getattr(reference, name), inputs)
    actual = outputs_and_gradients(getattr(cpu, name), inputs)
    for key, value in expected.items():
        value = torch.zeros_like(actual[key]) if value is None else value
        assert actual[key].dtype == value.dtype and actual[key].shape == value.shape, key
        scale = value.abs().max().clamp(min=1).item() if value.numel() else 1
        torch.testing.assert_close(
            actual[key].float(),
            value.float(),
            rtol=0,
            atol=tolerance * scale,
            msg=lambda text, key=key: f"{key}: {text}",
        )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("is_packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("length,width,n", [(1, 5, 1), (2, 64, 16), (63, 96, 5), (100, 70, 16), (257, 129, 3)])
def test_scan(length, width, n, is_packed, dtype):
    inputs = scan_inputs(3, length, width, n, dtype)
    if is_packed:
        inputs["seq_idx"] = packed(3, length)
    assert_same_as_reference("selective_scan", inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("absent", ["D", "z", "dt_bias", "initial_state"])
def test_scan_without(absent):
    assert_same_as_reference("selective_scan", scan_inputs(length=40) | {absent: None}, 2e-5)


def test_scan_without_softplus():
    inputs = scan_inputs(length=40)
    inputs |= {"dt": inputs["dt"].exp(), "dt_softplus": False, "dt_bias": None}
    assert_same_as_reference("selective_scan", inputs, 2e-5)


def test_scan_over_the_whole_range_of_steps():
    """Steps from nothing to decay in one position: the kernels' own exponential and logarithm at their ends."""
    inputs = scan_inputs(length=64)
    inputs["dt"] = torch.linspace(-90, 90, 64)[None, :, None].expand(2, 64, 70).contiguous()
    inputs["z"] = inputs["dt"].flip(1)
    assert_same_as_reference("selective_scan", inputs, 2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("is_packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("length,width,k", [(1, 5, 4), (2, 64, 4), (63, 96, 1), (100, 70, 3), (257, 129, 4)])
def test_conv(length, width, k, is_packed, dtype):
    inputs = conv_inputs(3, length, width, k, dtype)
    if is_packed:
        inputs["seq_idx"] = packed(3, length)
    assert_same_as_reference("causal_conv1d", inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("absent", ["bias", "activation", "initial_state"])
def test_conv_without(absent):
    assert_same_as_reference("causal_conv1d", conv_inputs(length=40) | {absent: None}, 2e-5)


def test_padding_may_hold_anything():
    for name, inputs in (("selective_scan", scan_inputs()), ("causal_conv1d", conv_inputs())):
        clean = inputs | {"seq_idx": packed(2, 100)}
        padding = clean["seq_idx"] < 0
        dirty = {
            key: t.masked_fill(padding[..., None], torch.nan) if is_float(t) and t.shape[:2] == (2, 100) else t
            for key, t in clean.items()
        }
        expected, actual = (outputs_and_gradients(getattr(cpu, name), each) for each in (clean, dirty))
        for key in expected:
            assert torch.equal(actual[key], expected[key]), key


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["any", "empty experts", "one hot expert", "dropped"])
def test_experts(kind, dtype):
    inputs = expert_inputs(kind, dtype=dtype)
    assert_same_as_reference("expert_feedforward", inputs, TOLERANCE[dtype])
    linear = {key: inputs[key] for key in ("x", "indices", "gates")} | {"weight": inputs["up"]}
    assert_same_as_reference("expert_linear", linear, TOLERANCE[dtype])
    counts = torch.bincount(inputs["indices"].flatten(), minlength=6)[:5] // 3  # some rows belong to no expert
    assert_same_as_reference(
        "grouped_linear", {"x": inputs["x"].flip(0), "weight": inputs["up"], "counts": counts}, TOLERANCE[dtype]
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    assert_same_as_reference("expert_feedforward", expert_inputs(activation=activation), 2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", ["any", "one hot expert", "dropped"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_few_tokens(kind, gated, dtype):
    """The path of generation, without gradients."""
    inputs = expert_inputs(kind, tokens=2, top_k=2, dtype=dtype)
    inputs["gates"] = inputs["gates"] if gated else None
    linear = {key: inputs[key] for key in ("x", "indices", "gates")} | {"weight": inputs["up"]}
    with torch.no_grad():
        for name, arguments in (("expert_feedforward", inputs), ("expert_linear", linear)):
            y, expected = (getattr(backend, name)(*arguments.values()) for backend in (cpu, reference))
            assert y.dtype == dtype
            torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(reduction, dtype, monkeypatch):
    """In several chunks, with positions that do not count, and logits whose exponentials would overflow."""
    monkeypatch.setattr(cpu_cross_entropy, "LOGITS", 13 * 37)
    torch.manual_seed(0)
    targets = torch.randint(0, 37, (50,))
    targets[::7] = -100
    inputs = {"hidden": torch.randn(50, 17, dtype=dtype), "weight": torch.randn(37, 17)}
    inputs |= {"targets": targets, "ignore_index": -100, "reduction": reduction}
    assert_same_as_reference("linear_cross_entropy", inputs, TOLERANCE[dtype])
    with torch.no_grad():
        loud = inputs | {"hidden": 100 * inputs["hidden"]}
        y, expected = (backend.linear_cross_entropy(*loud.values()) for backend in (cpu, reference))
    torch.testing.assert_close(y, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_cross_entropy_of_nonsense_that_does_not_count():
    hidden, weight, targets = torch.randn(9, 4), torch.randn(7, 4), torch.arange(9) % 7
    targets[3] = targets[5] = -100
    hidden[3], hidden[5] = torch.nan, torch.inf
    hidden.requires_grad_()
    loss = cpu.linear_cross_entropy(hidden, weight, targets, -100, "mean")
    torch.testing.assert_close(loss, reference.linear_cross_entropy(hidden, weight, targets, -100, "mean"))
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.isfinite().all() and not gradient[[3, 5]].any()


def test_cross_entropy_refuses_a_second_derivative():
    """Its gradients are constants to autograd: a gradient of theirs would be wrong without a word."""
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    loss = cpu.linear_cross_entropy(hidden, weight, torch.tensor([1, 0, 2]), -100, "mean")
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative here"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("tokens,n_experts,top_k", [(1, 5, 1), (1, 32, 2), (100, 7, 7), (33, 64, 3), (0, 4, 1)])
def test_route(tokens, n_experts, top_k):
    torch.manual_seed(0)
    logits, bias = 3 * torch.randn(tokens, n_experts), torch.randn(n_experts) / 4
    for actual, expected in zip(
        cpu.router_means(logits, bias, top_k), reference.router_means(logits, bias, top_k), strict=True
    ):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    assert all(len(row.unique()) == top_k for row in cpu.router_means(logits * torch.nan, bias, top_k)[0])


@pytest.mark.parametrize("shape", [(1, 1), (3, 20)])
def test_router_without_gradients(shape):
    """The kernel's way through a router, against the one that training takes."""
    torch.manual_seed(0)
    router = Router(24, 6, top_k=2, capacity_factor=1.0).eval()
    router.balance_bias += torch.randn(6) / 4
    x = torch.randn(*shape, 24)
    expected = router(x)
    with torch.no_grad():
        actual = router(x)
    torch.testing.assert_close(actual[:2], expected[:2])
    torch.testing.assert_close(tuple(actual.stats), tuple(t.detach() for t in expected.stats), atol=2e-5, rtol=2e-5)


CASES = [("selective_scan", scan_inputs(8, 100, 200)), ("causal_conv1d", conv_inputs(8, 100, 200))]
CASES += [("expert_feedforward", expert_inputs())]
LOSS = {"hidden": torch.randn(9, 4), "weight": torch.randn(7, 4), "targets": torch.arange(9) % 7}
COMPILED = [*CASES, ("linear_cross_entropy", LOSS | {"ignore_index": -100, "reduction": "mean"})]


@pytest.mark.parametrize("name,inputs", CASES[:2], ids=[name for name, _ in CASES[:2]])  # matrix products are torch's
def test_results_do_not_depend_on_threads(name, inputs):
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(outputs_and_gradients(getattr(cpu, name), inputs))
    torch.set_num_threads(before)
    for other, key in itertools.product(results[1:], results[0]):
        assert torch.equal(other[key], results[0][key]), key


@pytest.mark.parametrize("name,inputs", CASES, ids=[name for name, _ in CASES])
def test_calls_from_several_threads(name, inputs):
    expected = outputs_and_gradients(getattr(cpu, name), inputs)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(outputs_and_gradients, getattr(cpu, name), inputs) for _ in range(8)]
    for job, key in itertools.product(jobs, expected):
        assert torch.equal(job.result()[key], expected[key]), key


@pytest.mark.parametrize("when", ["in its own share", "as it waits"])
def test_an_interrupt_waits_for_other_threads(when, monkeypatch):
    """They write to memory that is free once the call is left."""
    done, begun = [], threading.Event()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def share(first, last):
        if first == 0 and when == "in its own share":
            begun.wait()
            raise KeyboardInterrupt
        if first == 1:
            begun.set()
            if when == "as it waits":
                _thread.interrupt_main()
            time.sleep(0.1)
            done.append(True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            cpu_kernel.run(share, 2, cpu_kernel.WORTH_THREADS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done


def test_integers_and_masks_of_other_dtypes():
    """Kernels read what they are told an address holds: int64 and bool here."""
    x, place = torch.randn(2, 3, 5, 8), torch.arange(10).view(2, 5)
    with torch.no_grad():
        torch.testing.assert_close(ops.rotary(x, place.int(), 1e4), ops.rotary(x, place, 1e4))
        visible = torch.ones(2, 5, 5).tril().bool()
        added = torch.zeros(2, 5, 5).masked_fill(~visible, -torch.inf)
        torch.testing.assert_close(ops.attention(x, x, x, added), ops.attention(x, x, x, visible))


@pytest.mark.parametrize("name,inputs", COMPILED, ids=[name for name, _ in COMPILED])
def test_compiles_as_one_graph(name, inputs):
    if "seq_idx" in inputs:
        inputs = inputs | {"seq_idx": packed(8, 100)}
    expected = outputs_and_gradients(getattr(cpu, name), inputs)
    for backend in ("eager", "aot_eager"):
        torch.compiler.reset()
        compiled = torch.compile(getattr(cpu, name), fullgraph=True, backend=backend)
        actual = outputs_and_gradients(compiled, inputs)
        for key in expected:
            assert torch.equal(actual[key], expected[key]), (backend, key)
        with torch.no_grad():
            # A graph keeps the products of training, a plain call has those of inference.
            torch.testing.assert_close(
                compiled(*inputs.values()), getattr(cpu, name)(*inputs.values()), rtol=1e-4, atol=2e-6
            )


def test_custom_ops_follow_the_rules():
    """Fake implementations, autograd registration and aliasing, by torch's own checks."""
    inputs = scan_inputs(2, 33, 6, 3)
    inputs["initial_state"] = inputs["initial_state"].transpose(1, 2)  # the kernel's states lie by channel
    tensors = [t.detach().contiguous().requires_grad_() for t in inputs.values() if is_float(t)]
    torch.library.opcheck(torch.ops.moemamba.cpu_selective_scan.default, (*tensors, True, None, True))
    x, weight, bias, state = (t.detach().contiguous() for t in conv_inputs().values() if is_float(t))
    x, weight, bias, state = (t.requires_grad_() for t in (x, weight, bias, state.transpose(1, 2).contiguous()))
    torch.library.opcheck(torch.ops.moemamba.cpu_causal_conv1d.default, (x, weight, bias, state, True, None))
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = torch.ops.moemamba.cpu_linear_cross_entropy.default
    torch.library.opcheck(loss, (hidden, weight, torch.arange(9) % 7, -100, True))
    rows, weight = torch.randn(9, 4, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)
    torch.library.opcheck(torch.ops.moemamba.cpu_grouped_linear.default, (rows, weight, torch.tensor([5, 0, 2])))


@pytest.mark.parametrize("batch,length", [(0, 5), (2, 0)])
def test_nothing(batch, length):
    assert_same_as_reference("selective_scan", scan_inputs(batch, length), 2e-5)
    assert_same_as_reference("causal_conv1d", conv_inputs(batch, length), 2e-5)


def test_step_equals_whole():
    """The same op with one position at a time, states handed on, without gradients: the path of generation."""
    inputs = scan_inputs(length=20)
    timed = [key for key, t in inputs.items() if is_float(t) and t.shape[:2] == (2, 20)]
    with torch.no_grad():
        y, final = cpu.selective_scan(*inputs.values())
        state, steps = inputs["initial_state"], []
        for t in range(20):
            now = {key: inputs[key][:, t : t + 1] for key in timed}
            step, state = cpu.selective_scan(*(inputs | now | {"initial_state": state}).values())
            steps.append(step)
    torch.testing.assert_close(torch.cat(steps, dim=1), y)
    torch.testing.assert_close(state, final)


# One element only is looked at: torch's own threads do not survive a fork.
SCRIPT = """
import os, torch
from moemamba import ops
from moemamba.layers import Router
x = torch.randn(8, 300, 300)
call = lambda: ops.causal_conv1d(x, torch.ones(300, 4))[0][1, 299, 299].item()
torch.set_num_threads(2)
expected = call()
child = os.fork() if hasattr(os, "fork") else None
if child == 0:
    os._exit(0 if call() == expected else 1)
elif child is not None:
    assert os.waitpid(child, 0)[1] == 0
print("same")
"""


@pytest.mark.slow
def test_first_use_is_announced_and_cached(tmp_path):
    """One line on stderr when kernels are compiled, silence when they come from the cache; forked children work."""
    for announced in (True, False):
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.stdout == "same\n", result.stderr
        assert ("compiling the CPU kernels" in result.stderr) == announced


def test_a_function_compiled_apart():
    """It is called by its address; arrays stand for theirs, tuples for what they hold; the number is seen to."""

    @kit.apart(1)
    def put(target: int, a: int, b: int, c: int) -> None:
        kit.integers(target, 1)[0] = a + 10 * b + 100 * c

    @kit.exact_kernel
    def right(at: tuple, place: int, several: tuple) -> None:
        put(at, kit.integers(place, 1), several, 3)

    @kit.exact_kernel
    def wrong(at: tuple, place: int, several: tuple) -> None:
        put(at, place, several)

    y, at = torch.zeros(1, dtype=torch.int64), (0, kit.entry(put))
    right(at, y.data_ptr(), (1, 2))
    assert y.item() == 321
    with pytest.raises(Exception, match="put takes 4 integers, and gets 3"):
        wrong(at, y.data_ptr(), (1, 2))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("who", ["caller", "thread"])
def test_no_thread_works_on_when_a_kernel_is_interrupted(who, stop):
    """What threads write to is freed by the caller: those that have begun are waited for, the others do not begin."""
    first, began, ended = threading.Barrier(2), [], []
    in_other = threading.Event()

    def compiled(start, end):
        began.append(start)
        if start < 2:
            first.wait(5)  # both at work
        if start == (0 if who == "caller" else 1):
            raise stop
        time.sleep(0.2)
        ended.append(start)

    pool = ThreadPoolExecutor(2)
    busy = pool.submit(in_other.wait, 10)  # so that one thread is left, and the last share has to wait
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(stop):
            patch.setattr(cpu_kernel, "_pool", lambda: pool)
            cpu_kernel.run(compiled, 3, 1 << 30)
        at_once = list(began), list(ended)
        in_other.set()
        pool.shutdown()
    finally:
        torch.set_num_threads(before)
    assert busy.result() and (began, ended) == at_once  # nothing begins or ends afterwards
    assert (1 if who == "caller" else 0) in ended


def test_interrupted_while_it_hands_out_shares(monkeypatch):
    """What no thread was ever given is not waited for."""
    pool, submitted, ended, left = ThreadPoolExecutor(1), [], [], []

    def share(start, end):
        time.sleep(0.1)
        ended.append(start)

    def submit(*task):
        if submitted:
            raise KeyboardInterrupt
        submitted.append(pool.submit(*task))

    def call():
        try:
            cpu_kernel.run(share, 4, cpu_kernel.WORTH_THREADS)
        except KeyboardInterrupt:
            left.append(list(ended))

    monkeypatch.setattr(cpu_kernel, "_pool", lambda: SimpleNamespace(submit=submit))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    caller.join(20)
    pool.shutdown()
    assert left == [ended]  # nothing begins or ends afterwards


def test_interrupted_while_it_waits():
    """A second interrupt does not end the waiting either, and the first is the one that is raised."""
    both, leaving, ended = threading.Barrier(2), threading.Event(), []

    def compiled(start, end):
        both.wait(5)
        if start == 0:
            raise KeyboardInterrupt("first")
        leaving.wait(5)
        ended.append(start)

    def impatient(others):
        if not leaving.is_set():
            leaving.set()
            raise KeyboardInterrupt("second")
        return wait(others)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt, match="first"):
            patch.setattr(cpu_kernel, "wait", impatient)
            cpu_kernel.run(compiled, 2, 1 << 30)
    finally:
        torch.set_num_threads(before)
    assert ended == [1]


@pytest.mark.parametrize("before", [True, False])
def test_garbage_is_collected_again_after_compiling(before, monkeypatch):
    monkeypatch.setattr(cpu_kernel, "say", lambda text: None)
    listener, found = cpu_kernel._Compiling(), []
    own, others = (SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=f)}) for f in (ops.linear, os.walk))
    steps = [(listener.on_start, others), (listener.on_end, others), (listener.on_start, own)]
    steps += [(listener.on_start, others), (listener.on_end, others), (listener.on_end, own)]
    if not before:
        gc.disable()
    try:
        for step, event in steps:
            step(event)
            found.append(gc.isenabled())
    finally:
        gc.enable()
    assert found == ([True, True, False, False, False, True] if before else [False] * 6)


def test_nowhere_to_write(monkeypatch):
    """Kernels compile in every process where no folder can be written to."""

    monkeypatch.setattr(cpu_kernel, "writable", lambda folder: False)
    cpu_kernel._cache_folder.cache_clear()
    try:
        assert cpu_kernel._cache_folder() == ""
        compiled = cpu_kernel.kernel(lambda first, last: None)
        compiled(0, 1)
    finally:
        cpu_kernel._cache_folder.cache_clear()


def test_backend_in_use():
    x = torch.zeros(1, 1, 1)
    assert ops.choose("selective_scan", x) == ops.choose("causal_conv1d", x) == "cpu"
    assert ops.choose("selective_scan", x.double()) == "reference"


@pytest.mark.parametrize("width", [1, 17, 64, 257])
@pytest.mark.parametrize("rows", [1, 31, 100])
def test_rms_norm(rows, width):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, rows, width), "weight": torch.randn(width)}
    dy = torch.randn(2, rows, width)
    found = []
    for function in (cpu.rms_norm, reference.rms_norm):
        own = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        y = function(**own, eps=1e-5)
        y.backward(dy)
        found.append({"y": y.detach()} | {name: value.grad for name, value in own.items()})
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():  # the way around the dispatcher
        assert torch.equal(cpu.rms_norm(**inputs, eps=1e-5), found[0]["y"])
    assert cpu.rms_norm(inputs["x"].bfloat16(), inputs["weight"].bfloat16(), 1e-5).dtype == torch.bfloat16

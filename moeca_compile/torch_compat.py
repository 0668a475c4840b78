"""Every private torch name the package uses, one function each, with the versions it was tested on.

Dynamo offers no public way to learn which backend is compiling, which module the user compiled, or
to lift the mark of a frame it gave up on. Keeping those names here makes a new torch release one
file to read and `tests/capture/test_torch_compat.py` one file to run, however long it gets.

    compiling_with(pred)      -> bool         constant while Dynamo traces
    compile_call()            -> CompileCall  the outermost torch.compile call on this thread
    on_call_end(call, f)      -> bool         run f when that call has left compiled code
    reset_code(code)          -> None         forget compiled variants and skip marks
    traced_frame()            -> TracedFrame  what the running backend call is compiling
    guard_identity(module)    -> bool         compiled code will serve no other module
    backend_settings(compiled) -> dict        what the user passed on to the backend
    compile_apart(f, backend) -> callable     torch.compile, its recompiles counted apart
    trace_whole(m, backend)   -> callable     one call as one graph, for a check
    without_kernels()         -> context      graphs run as they are where Inductor would compile
    without_code()            -> context      graphs are written down as Python only when needed
    remembered_indices()      -> context      Inductor simplifies an index once
    mark_static(gm, at)       -> None         inputs whose addresses CUDA graphs may record
    raise_recompile_limit()   -> callable     puts it back
    trace_no_more(call)       -> bool         what is left of the call runs as it is
    Trace.current()           -> Trace        what make_fx is making, to be added to by hand
    is_compile_wrapper(f)     -> bool         f is another function, compiled
    known_options(options)    -> dict         Inductor options that this torch has
    c_library(source)         -> CDLL         C++ compiled as Inductor compiles its kernels
"""

from __future__ import annotations

import ast
import ctypes
import functools
import inspect
import operator
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch._C._dynamo.eval_frame import reset_code as _reset_code
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
    track_tensor_tree,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import _pytree

# Raised where Python has to know a size that is known at run time only. Tested on torch 2.13.
OpenSize = GuardOnDataDependentSymNode


@torch.compiler.assume_constant_result
def compiling_with(predicate: Callable[[Any], bool]) -> bool:
    """Whether `predicate` holds for the backend that Dynamo is tracing for; False outside a trace.

    Dynamo calls it once while tracing and keeps the answer as a Python constant. That needs no
    guard: code compiled for one backend is never run for another one. Tested on torch 2.13.
    """
    transaction = _current_trace()
    return transaction is not None and bool(predicate(transaction.output.compiler_fn))


def _current_trace() -> Any | None:
    """The trace that Dynamo is making on this thread, or None. Tested on torch 2.11, 2.13."""
    try:
        return InstructionTranslator.current_tx()  # None outside of a trace before 2.13
    except AttributeError:  # since then the thread-local exists only while something is traced
        return None


@dataclass(frozen=True)
class CompileCall:
    """One call of something the user compiled: the callable and what it was called with."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    frame: FrameType


def compile_call() -> CompileCall | None:
    """The outermost `torch.compile` call on this thread's stack, or None. Tested on torch 2.13."""
    found: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
            found = frame
        frame = frame.f_back
    if found is None:
        return None
    values = found.f_locals
    return CompileCall(values["fn"], values["args"], values["kwargs"], found)


def outermost_module(call: CompileCall) -> tuple[torch.nn.Module, tuple[Any, ...], Any] | None:
    """The outermost module called within `call`, its args and kwargs. Tested on torch 2.13."""
    found: FrameType | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not call.frame:
        if frame.f_code is torch.nn.Module._call_impl.__code__:
            found = frame
        frame = frame.f_back
    if found is None:
        return None
    values = found.f_locals
    return values["self"], values["args"], values["kwargs"]


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply `function` to all leaves of nested lists, tuples and dicts. Tested on torch 2.13."""
    return _pytree.tree_map(function, tree)


def leaves(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of nested lists, tuples and dicts, and a comparable structure. Tested on 2.13."""
    return _pytree.tree_flatten(tree)


def on_call_end(call: CompileCall, action: Callable[[], None]) -> bool:
    """Run `action` when `call` ends, outside of compiled code; False if torch has no such place.

    Uses the list of exit callbacks that the wrapper keeps in a local. Tested on torch 2.13.
    """
    cleanups = call.frame.f_locals.get("cleanups")
    if not isinstance(cleanups, list):
        return False
    cleanups.append(action)
    return True


def reset_code(code: CodeType) -> None:
    """Drop what Dynamo compiled for `code` and its skip mark, so that the next call traces again.

    Must not be called from within a backend call: resetting a code object that is being compiled
    kills the process (SIGFPE). Tested on torch 2.13.
    """
    _reset_code(code)


_STEP = r"\.\w+|\['\w+'\]|\[\d+\]"  # how Dynamo writes a way through Python objects


@dataclass(frozen=True)
class TracedFrame:
    """The Python frame whose graph a backend has been handed; `breaks` if the frame goes on."""

    code: CodeType
    breaks: bool
    reason: str
    graph: Graph


def traced_frame() -> TracedFrame | None:
    """What is being compiled, to be asked inside a backend call; None elsewhere. Tested on 2.13."""
    transaction = _current_trace()
    if transaction is None:
        return None
    code, graph = transaction.f_code, transaction.output.graph
    why = transaction.output.compile_subgraph_reason
    if why is None:
        return TracedFrame(code, False, "", graph)
    last = why.user_stack[-1] if why.user_stack else None
    reason = why.reason.strip().split("\n")[0]
    where = f"{last.filename}:{last.lineno} in {last.name}" if last is not None else ""
    reason = f"{reason} at {where}" if where else reason
    return TracedFrame(code, bool(why.graph_break), reason, graph)


def traced_module() -> torch.nn.Module | None:
    """The module that a compiled function calls, to be asked inside a backend call.

    Dynamo inlines it, so it is not on the stack. None if not all of the graph belongs to one, or
    where it cannot be told which. Tested on torch 2.13.
    """
    transaction = _current_trace()
    if transaction is None:
        return None
    stacks = (node.meta.get("nn_module_stack") for node in transaction.output.graph.nodes)
    places = {next(iter(stack.values()))[0] for stack in stacks if stack}
    found = re.fullmatch(rf"([LG])((?:{_STEP})+)", places.pop()) if len(places) == 1 else None
    if found is None:
        return None
    value: Any = transaction.f_locals if found[1] == "L" else transaction.f_globals
    try:
        for step in re.findall(_STEP, found[2]):
            dotted = step.startswith(".")
            value = getattr(value, step[1:]) if dotted else value[ast.literal_eval(step[1:-1])]
    except (AttributeError, LookupError, TypeError):
        return None
    return value if isinstance(value, torch.nn.Module) else None


def compile_apart(module: torch.nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` whose entries do not count against the recompile limit of the same code.

    Isolated entries exist since torch 2.13; older versions count them. Tested on torch 2.13.
    """
    apart = {"isolate_recompiles": True}
    known = apart.keys() <= inspect.signature(torch.compile).parameters.keys()
    return torch.compile(module, backend=backend, **(apart if known else {}))  # type: ignore[call-overload]


def _keep_host_reads() -> Any:
    """A context for traced code in which `.item()`, `nonzero` and the like stay in the graph.

    The settings of `fullgraph=True`, for one function. The second one has to be put on torch's list
    for good: a frame that breaks makes the context anew. Tested on torch 2.13.
    """
    from torch._dynamo import decorators

    names = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")
    allowed = decorators._allowed_config_patches
    decorators._allowed_config_patches = tuple(dict.fromkeys((*allowed, *names)))
    return decorators.patch_dynamo_config(dict.fromkeys(names, True))


KEEP_HOST_READS = _keep_host_reads()


def trace_whole(module: torch.nn.Module, backend: Callable[..., Any]) -> Callable[..., Any]:
    """One call of `module` as a single graph or an error; nothing of it stays compiled.

    Works inside of a running compiled call, though not inside a backend call. Tested on 2.13.
    """
    apart = {"isolate_recompiles": True}
    known = apart.keys() <= inspect.signature(torch.compile).parameters.keys()
    given = apart if known else {}
    compiled = torch.compile(module, backend=backend, fullgraph=True, **given)  # type: ignore[call-overload]

    def call(*args: Any, **kwargs: Any) -> Any:
        forward = module.forward.__func__  # type: ignore[attr-defined]
        try:
            with torch.compiler.set_stance("default"):
                return compiled(*args, **kwargs)
        finally:
            reset_code(forward.__code__)

    return call


def gradient_switch(node: Node) -> bool | None:
    """What a node of Dynamo's graph switches gradients to, None if it does not. Tested on 2.13."""
    return bool(node.args[0]) if node.target is torch._C._set_grad_enabled else None


def is_compile_wrapper(function: Any) -> bool:
    """Whether `torch.compile` made `function` of the one in its `__wrapped__`. Tested on 2.13."""
    return hasattr(function, "_torchdynamo_orig_callable") and hasattr(function, "__wrapped__")


def raise_recompile_limit() -> Callable[[], None]:
    """No limit to how often one code object is compiled, until the result is called.

    Tested on torch 2.13.
    """
    patch = torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=100_000)
    patch.__enter__()
    return lambda: patch.__exit__(None, None, None)


_AS_IT_IS: dict[int, FrameType] = {}  # by thread: in which call Dynamo is to leave frames alone


def trace_no_more(call: CompileCall) -> bool:
    """Run the frames that `call` still enters as they are; False if torch has no end of a call.

    They get no mark, so the next call traces them. Dynamo has no public way for it: a stance counts
    from the next call on, and a frame that a setting makes it skip stays skipped. Tested on 2.13.
    """
    thread = get_ident()

    def resume() -> None:
        _AS_IT_IS.pop(thread, None)

    if not on_call_end(call, resume):
        return False
    _ask_before_tracing()
    _AS_IT_IS[thread] = call.frame
    return True


@functools.cache
def _ask_before_tracing() -> None:
    from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy
    from torch._dynamo.convert_frame import CatchErrorsWrapper
    from torch._dynamo.types import ConvertFrameReturn

    convert = CatchErrorsWrapper.__call__

    def ask(self: Any, *frame: Any) -> Any:
        paused = _AS_IT_IS.get(get_ident())
        call = compile_call() if paused is not None else None
        if call is not None and call.frame is paused:  # not one that has ended some other way
            strategy = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
            return ConvertFrameReturn(frame_exec_strategy=strategy, apply_to_code=False)
        return convert(self, *frame)

    CatchErrorsWrapper.__call__ = ask  # type: ignore[method-assign]


def guard_identity(module: torch.nn.Module) -> bool:
    """Let the code being compiled serve no other object than `module`; False if the frame has none.

    To be called inside a backend call. Dynamo guards modules by what their forward reads, so two
    models of one class would share compiled code. Tested on torch 2.13.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import LocalSource

    transaction = _current_trace()
    values = {} if transaction is None else transaction.f_locals
    names = [name for name, value in values.items() if value is module]
    if names:
        install_guard(LocalSource(names[0], is_input=True).make_guard(GuardBuilder.ID_MATCH))
    return bool(names)


def placeholder_source(node: Node) -> str:
    """Where Dynamo got a graph input from, e.g. `L['timestep']`, or "". Tested on torch 2.13."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method before 2.9, a property since


def new_fake_mode() -> FakeTensorMode:
    """A fake tensor mode with a shape environment of its own. Tested on torch 2.13."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def is_fake(value: object) -> bool:
    """Whether `value` is a tensor without numbers. Tested on torch 2.13."""
    return isinstance(value, FakeTensor)


_KERNELS = [True]


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, graphs run as they are where Inductor would compile them; not thread-safe.

    For measuring images and counts, which need no kernels: `moeca quality --engine graph`.
    Compilation is lazy: the block has to hold the calls, and what was compiled in it must not be
    called behind it.
    """
    _KERNELS.append(False)
    try:
        yield
    finally:
        _KERNELS.pop()


def compiles_kernels() -> bool:
    """False inside of `without_kernels`."""
    return _KERNELS[-1]


def without_code() -> Any:
    """Inside, traced graphs are written down as Python only where somebody runs or reads them.

    Generating and compiling that text for a graph of some thousand nodes, several times on its way
    to Inductor, takes as long as tracing a layer. Dynamo does the same around a backend's call.
    Tested on torch 2.13.
    """
    return _use_lazy_graph_module(True)


def graph_module(root: Any, graph: Graph) -> GraphModule:
    """`GraphModule(root, graph)`; inside of `without_code` without its text. Tested on 2.13."""
    return _make_graph_module(root, graph)


class Trace:
    """The graph that `make_fx` is making on this thread, to be added to by hand. Tested on 2.13."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer
        self.graph: Graph = tracer.graph

    @classmethod
    def current(cls) -> Trace | None:
        """None where nothing is traced."""
        mode = get_proxy_mode()
        return None if mode is None else cls(mode.tracer)

    @property
    def last(self) -> Node:
        """The newest node, the graph's root where there is none."""
        return next(iter(reversed(self.graph.nodes)), self.graph._root)

    def behind(self, node: Node) -> list[Node]:
        """All nodes newer than `node`."""
        found = []
        while (node := node.next) is not self.graph._root:
            found.append(node)
        return found

    def node(self, value: Tensor) -> Node | None:
        """The node that `value` stands for; None for a constant."""
        found = get_proxy_slot(value, self._tracer, None)
        return None if found is None else found.proxy.node

    def stand_for(self, node: Node, like: Tensor) -> Tensor:
        """A value of the look of `like`, taken for `node`."""
        with disable_proxy_modes_tracing(), DisableTorchFunction():
            value = torch.empty_strided(
                like.shape, like.stride(), dtype=like.dtype, device=like.device
            )
        self.take(value, node)
        return value

    def take(self, value: Tensor, node: Node) -> None:
        """From here on every op takes `value` for `node`."""
        track_tensor_tree(value, Proxy(node, self._tracer), constant=None, tracer=self._tracer)

    def copy(self, node: Node, operand: Callable[[Node], Node]) -> Node:
        """Append `node` once more, on other operands.

        A size that it reads at run time is another one, within the same bounds: by this entry of
        `meta` whoever traces the graph again finds what is known of it.
        """
        made = self.graph.node_copy(node, operand)
        if sizes := node.meta.get("unbacked_bindings"):
            env = _shape_env(node.meta["val"])
            made.meta["unbacked_bindings"] = {_like(s, env): at for s, at in sizes.items()}
        return made


def _shape_env(value: Any) -> ShapeEnv:
    """That of the sizes in `value` which are known at run time only."""
    found = leaves(value)[0]
    sizes = [s for v in found for s in (v.shape if isinstance(v, Tensor) else (v,))]
    return next(s.node.shape_env for s in sizes if isinstance(s, torch.SymInt))


def _like(symbol: Any, env: ShapeEnv) -> Any:
    """A new symbol for a size known at run time only, within the bounds of `symbol`."""
    bounds = env.bound_sympy(symbol)
    with disable_proxy_modes_tracing(), env.ignore_fresh_unbacked_symbols():
        size = env.create_unbacked_symint()
        for bound, holds in ((bounds.lower, operator.ge), (bounds.upper, operator.le)):
            if bound.is_finite:
                torch._check(holds(size, int(bound)))
    return size.node.expr


def mark_static(gm: GraphModule, positions: Collection[int]) -> None:
    """Tell AOTAutograd which inputs keep their addresses: weights and caches.

    CUDA graphs then read and write them in place; other inputs are copied into a graph's own memory
    at every call, and a graph that writes to one is not recorded at all. "unguarded": another
    address, of another lane, is another recording. What Dynamo leaves on a graph has to be there:
    a source on every input and constant, all different, and the two marks on the module.
    Tested on torch 2.13.
    """
    from torch._dynamo.source import LocalSource

    gm.meta.setdefault("dynamo_compile_id", None)
    constants = [*dict(gm.named_parameters()), *dict(gm.named_buffers())]
    gm._param_name_to_source = {  # type: ignore[assignment]
        name: LocalSource(f"moeca_constant_{number}") for number, name in enumerate(constants)
    }
    holes = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for number, hole in enumerate(holes):
        hole._dynamo_source = LocalSource(f"moeca_input_{number}")  # type: ignore[attr-defined]
        if number in positions:
            hole.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def inductor(
    gm: GraphModule,
    inputs: list[Any],
    fake_mode: FakeTensorMode,
    config: dict[str, Any],
) -> Callable[..., Any]:
    """Compile an ATen graph with Inductor on fake `inputs`, both of its caches in use.

    A tracing context of its own keeps the caller's (Dynamo's) guards and shapes untouched.
    Tested on torch 2.13.
    """
    if not compiles_kernels():
        return gm
    from torch._inductor.compile_fx import compile_fx  # takes seconds: only when needed

    with torch.no_grad(), tracing(TracingContext(fake_mode)), remembered_indices():
        return compile_fx(gm, inputs, config_patches=config)  # type: ignore[return-value]


@contextmanager
def remembered_indices() -> Iterator[None]:
    """Inside, Inductor remembers more of the indices that it has simplified.

    Its own caches hold 128. A layer with rows of sizes known at run time has more than that, asks
    for the same ones kernel by kernel, and sympy takes tens of milliseconds for each. The compiler
    has its own name for one of the functions. Without them nothing is changed. Tested on 2.13.
    """
    from torch._inductor import sizevars
    from torch._inductor.codegen import cpp

    found = [
        (module, name, vars(module)[name])
        for module in (sizevars, cpp)
        for name in ("simplify_index_in_vec_range", "stride_at_vec_range")
        if hasattr(vars(module).get(name), "__wrapped__")
    ]
    for module, name, function in found:
        setattr(module, name, _remembering(function.__wrapped__))
    try:
        yield
    finally:
        for module, name, function in found:
            setattr(module, name, function)


@functools.cache
def _remembering(function: Callable[..., Any]) -> Callable[..., Any]:
    return functools.lru_cache(maxsize=8192)(function)


def inductor_fallback(
    gm: GraphModule, inputs: list[Any], config: dict[str, Any]
) -> Callable[..., Any]:
    """Plain Inductor on Dynamo's graph, inside the backend call. Tested on torch 2.13."""
    if not compiles_kernels():
        return gm.forward
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, inputs, config_patches=config)  # type: ignore[return-value]


def compiled_root(compiled: Any) -> torch.nn.Module | None:
    """The module behind what `torch.compile` returned, or behind `model.compile()`; None if none.

    Tested on torch 2.13.
    """
    pending, seen = [compiled], set[int]()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        inner = getattr(current, "_orig_mod", None)
        if isinstance(inner, torch.nn.Module):
            return inner
        if isinstance(current, torch.nn.Module):
            return current
        names = ("__self__", "_torchdynamo_orig_callable", "__wrapped__")
        pending.extend(getattr(current, name, None) for name in names)
    return None


def backend_settings(compiled: Any) -> dict[str, Any] | None:
    """What `torch.compile` hands this package's backend beside the graph: {"options": {..}}.

    compiled: what it returned, or a module after `module.compile()`; None for anything else.
    Dynamo shares compiled code between calls of `torch.compile` where these are equal.
    Tested on torch 2.13.
    """
    context = getattr(compiled, "dynamo_ctx", None)
    inner = getattr(compiled, "_compiled_call_impl", None)
    pending = [getattr(context, "callback", None)]
    pending += [_captured(function, "callback") for function in (compiled, inner)]
    seen = set[int]()
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        kwargs = getattr(current, "kwargs", None)
        if isinstance(kwargs, dict) and hasattr(current, "compiler_fn"):
            ours = getattr(current.compiler_fn, "_moeca_backend", False)
            return kwargs if ours else None
        pending.append(getattr(current, "_torchdynamo_orig_backend", None))
    return None


def _captured(function: Any, name: str) -> Any:
    """The variable `name` that `function` closes over, or None."""
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[names.index(name)].cell_contents if name in names else None


# Functions that torch.nn.functional re-exports under other names. Tested on torch 2.13.
NATIVE_FUNCTIONS: Any = torch._C._nn  # type: ignore[attr-defined]


def dispatched_name(target: Any) -> str:
    """`aten.linear.default` of an operator, `moeca.expert_rows` of all its overloads; else "".

    Tested on torch 2.13.
    """
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return target._qualified_op_name.replace("::", ".")
    return ""


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Add a text to torch's structured trace; `text` is called only while TORCH_TRACE is on.

    Tested on torch 2.13.
    """
    torch._logging.trace_structured(  # type: ignore[reportPrivateImportUsage]
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
        expect_trace_id=False,
    )


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor options of a `torch.compile` mode; RuntimeError if unknown. Tested on torch 2.13."""
    return torch._inductor.list_mode_options(mode)


def known_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the Inductor options that this torch has. Tested on torch 2.13."""
    from torch._inductor import config  # Inductor takes a second to import

    return {name: value for name, value in options.items() if name in config._config}  # type: ignore[attr-defined]


def c_library(source: str) -> ctypes.CDLL:
    """C++ source compiled with Inductor's compiler and flags, kept in its cache; any exception of
    that, CppCompileError first. Tested on torch 2.13.
    """
    from torch._inductor.codecache import CppCodeCache  # Inductor takes a second to import

    return CppCodeCache.load(source)  # type: ignore[return-value]

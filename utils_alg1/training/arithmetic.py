"""How training steps are computed: in which data type, by which library and which gradient.

It is chosen from the device, the processor and the sizes, never from a clock, so that the same run always
decides the same. A checkpoint holds it, and a resumed run keeps to it: only so it gets the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from parameters import MODEL_OPTIONS, Parameters
from utils_alg1.base.errors import Alg1Error
from utils_alg1.base.text import format_count
from utils_alg1.network.gradient import OPTIONS
from utils_alg1.network.products import Products, onednn_works
from utils_alg1.training.distributed import Distributed
from utils_alg1.utils_config_loader import RESUMED

SMALL_STEP_FLOPS = 1e9  # a micro-batch with fewer floating-point operations is bound by calls, not products
# MKL uses no AVX-512 on AMD processors. Up to Zen 4 it would not be faster, and oneDNN gains a tenth in large
# products; from Zen 5 on it takes half the time, in smaller ones too.
ZEN5_FAMILY = 26
ONEDNN_FLOPS = 1e10  # of a micro-batch, on AMD processors before Zen 5
BFLOAT16_N_EMBD = 128  # bfloat16 pays for its conversions from this width on
COMPILE_FLOPS = 1e15  # a run on CUDA with at least so many is compiled: a guess, not a measurement
DTYPES = ("float32", "bfloat16", "float16")
LIBRARIES = {"pytorch": "PyTorch", "onednn": "oneDNN"}
GRADIENTS = ("manual", "autograd")
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}  # of a processor that multiplies bfloat16 faster than float32


@dataclass(frozen=True)
class Processor:
    """What /proc/cpuinfo says of the processor; where there is none, as on macOS, nothing is known of it."""

    vendor: str = ""
    family: int = 0
    name: str = ""
    flags: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: Path = Path("/proc/cpuinfo")) -> Processor:
        try:
            lines = [line.partition(":") for line in path.read_text("utf-8", "replace").splitlines()]
        except OSError:
            return cls()
        values = {name.strip(): value.strip() for name, _, value in reversed(lines)}  # the first core's
        family = values.get("cpu family", "")
        flags = frozenset(values.get("flags", "").split())
        number = int(family) if family.isdecimal() else 0
        return cls(values.get("vendor_id", ""), number, values.get("model name", ""), flags)

    @property
    def onednn_flops(self) -> float:
        """From how many operations of a micro-batch on oneDNN's products are faster in float32."""
        if self.vendor != "AuthenticAMD":
            return math.inf
        return SMALL_STEP_FLOPS if self.family >= ZEN5_FAMILY else ONEDNN_FLOPS


@dataclass(frozen=True)
class Arithmetic:
    """How training steps are computed.

    Attributes:
        device: the type of the device: cpu, cuda, mps, xpu.
        dtype: the data type of the products of the forward pass.
        products: the library of the manual gradient's products: pytorch (its own choice) or onednn.
        gradient: manual (network/gradient.py) or autograd.
        compiled: whether by torch.compile; None if an older checkpoint does not tell.
        joined: whether the norm of the gradients and AdamW take the parameters of a group as one tensor,
            which changes the last digits; False for checkpoints of versions that did not.
        muon: the data type of the products of Muon's iteration, whose result need not be exact; float32 for
            other optimizers.
        threads: of a CPU, by which sums are split; None on other devices, and if an older checkpoint does not
            tell.
        platform: of a CPU, PyTorch's version and the processor; None as `threads`.
    """

    device: str = "cpu"
    dtype: str = "float32"
    products: str = "pytorch"
    gradient: str = "manual"
    compiled: bool | None = False
    joined: bool = True
    muon: str = "float32"
    threads: int | None = None
    platform: str | None = None

    def differences(self, other: Arithmetic) -> str:
        """Return in words what is different from the other; what either does not tell is not."""
        words = {
            "device": self.device,
            "dtype": self.dtype,
            "products": f"products by {LIBRARIES[self.products]}",
            "gradient": f"{self.gradient} gradient",
            "compiled": "compiled" if self.compiled else "not compiled",
            "joined": "joined parameters" if self.joined else "separate parameters",
            "muon": f"Muon in {self.muon}",
            "threads": format_count(self.threads or 0, "thread"),
            "platform": str(self.platform),
        }
        pairs = {name: (value, getattr(other, name)) for name, value in vars(self).items()}
        different = [name for name, (a, b) in pairs.items() if None not in (a, b) and a != b]
        return ", ".join(words[name] for name in different)

    @property
    def is_known(self) -> bool:
        """Whether this version knows the values."""
        known = self.dtype in DTYPES and self.products in LIBRARIES and self.gradient in GRADIENTS
        known = known and self.muon in DTYPES and isinstance(self.device, str)
        known = known and self.compiled in (None, False, True) and self.joined in (False, True)
        return known and isinstance(self.threads, int | None) and isinstance(self.platform, str | None)

    def products_of_gradient(self) -> Products:
        """Return the products of the manual gradient."""
        return Products(getattr(torch, self.dtype), self.products == "onednn")


def environment(device: torch.device, processor: Processor) -> dict[str, Any]:
    """Return what of an arithmetic is not chosen: threads and platform."""
    if device.type != "cpu":
        return {"threads": None, "platform": None}
    name = " ".join(filter(None, (processor.name, torch.backends.cpu.get_cpu_capability())))
    return {"threads": torch.get_num_threads(), "platform": f"PyTorch {torch.__version__} on {name}"}


def choose_arithmetic(params: Parameters, device: torch.device, processor: Processor) -> Arithmetic:
    """Return the fastest arithmetic for a new run; or what --dtype and --compile ask for.

    Raises:
        Alg1Error: the device does not support the dtype.
    """
    config, flops = params.train, params.flops_per_micro_batch()
    small = flops < SMALL_STEP_FLOPS
    if (dtype := config.dtype) == "auto":
        wide = params.model.n_embd >= BFLOAT16_N_EMBD and not small
        if device.type == "cuda":
            dtype = "bfloat16" if has_bfloat16(device, processor) else "float16"
        else:  # Apple's and Intel's GPUs were never measured
            dtype = "bfloat16" if wide and has_bfloat16(device, processor) else "float32"
    if not supports(device, dtype):
        needs = "CUDA" if dtype == "float16" else "macOS 14"
        others = "--dtype float32 or --dtype bfloat16" if dtype == "float16" else "--dtype float32"
        raise Alg1Error(f"--dtype {dtype} needs {needs}, and the device is {device}", f"use {others}")
    products = "onednn" if dtype == "bfloat16" or flops >= processor.onednn_flops else "pytorch"
    muon = "float32"
    if config.optimizer == "muon" and dtype == "bfloat16" and has_bfloat16(device, processor):
        muon = "bfloat16"
    compiled = compiling_pays(params, device)
    chosen = Arithmetic(device.type, dtype, products, "manual", compiled, muon=muon)
    return supported(dataclasses.replace(chosen, **environment(device, processor)), params)


def has_bfloat16(device: torch.device, processor: Processor) -> bool:
    """Return whether a device has instructions for products in bfloat16, and does not emulate them."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # which is asked, rather than the current one
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(processor.flags & BFLOAT16_FLAGS)


def supports(device: torch.device, dtype: str) -> bool:
    """Return whether training steps can be computed in a data type on a device."""
    if dtype == "float16":  # it needs a loss scaler, which was tried on CUDA only
        return device.type == "cuda"
    if dtype == "bfloat16" and device.type == "mps":  # elsewhere autocast does nothing
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return True


def compiling_pays(params: Parameters, device: torch.device) -> bool:
    """Return whether to compile a new run: what --compile says, or whether it ends sooner by it.

    On a CPU compiling pays after some ten thousand steps, and needs a C++ compiler that may be missing: it
    has to be asked for.
    """
    config = params.train
    flops = params.flops_per_micro_batch() * config.grad_accum_steps * config.max_iters
    pays = device.type == "cuda" and flops >= COMPILE_FLOPS
    return {"on": True, "off": False}.get(config.compile, pays)


def supported(arithmetic: Arithmetic, params: Parameters) -> Arithmetic:
    """Return the same, without what cannot be used here.

    The manual gradient (network/gradient.py) is for a CPU. oneDNN's operators may be missing, and cannot be
    compiled.
    """
    model = params.model
    known = all(getattr(model, name) == MODEL_OPTIONS[name] for name in MODEL_OPTIONS.keys() - OPTIONS)
    if not (known and arithmetic.device == "cpu"):
        arithmetic = dataclasses.replace(arithmetic, gradient="autograd")
    usable = arithmetic.gradient == "manual" and not arithmetic.compiled
    if arithmetic.products == "onednn" and not (usable and onednn_works(getattr(torch, arithmetic.dtype))):
        arithmetic = dataclasses.replace(arithmetic, products="pytorch")
    return arithmetic


def recorded_arithmetic(
    recorded: dict[str, Any], params: Parameters, device: torch.device, dist: Distributed
) -> Arithmetic:
    """Return the arithmetic that a checkpoint holds; or that of the versions that recorded none.

    Those knew nothing of the processor, and the manual gradient only of one process, in float32 and without
    dropout.
    """
    if "dtype" in recorded:
        return Arithmetic(**recorded)
    chosen = choose_arithmetic(params, device, Processor())
    old = dataclasses.replace(chosen, joined=False, muon="float32", threads=None, platform=None, **recorded)
    if old.dtype != "float32" or params.model.dropout or dist.world_size > 1:
        return dataclasses.replace(old, products="pytorch", gradient="autograd")
    return old


def keep_arithmetic(
    before: Arithmetic, params: Parameters, device: torch.device, processor: Processor
) -> Arithmetic:
    """Return the arithmetic of a resumed run: that of the checkpoint, as far as this machine supports it.

    Whether to compile is asked anew only by a flag: what the run began with may have failed.
    """
    dtype = before.dtype if supports(device, before.dtype) else "float32"
    compiled = before.compiled
    asked = params.train.compile != "auto" and params.origins["compile"] != RESUMED
    if compiled is None or asked:
        compiled = compiling_pays(params, device)
    wanted = dataclasses.replace(before, device=device.type, dtype=dtype, compiled=compiled)
    return supported(dataclasses.replace(wanted, **environment(device, processor)), params)

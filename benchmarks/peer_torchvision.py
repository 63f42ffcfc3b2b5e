"""torchvision beside a torch that was built without CUDA, for parity and for speed. Only for a process of its own.

Its wheel lists libraries of the CUDA build of torch, which are not here, so it cannot be imported as it comes, and its
presence alone breaks packages that look for it. So it stands in a folder of its own (`make test` fills it), and is
imported by `load` after two empty libraries, made by gcc, have given the loader the names it asks for. None of them is
called on a CPU.
"""

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

FOLDER = Path(sys.prefix) / "peers"


def missing() -> str:
    """Why torchvision cannot be loaded here, in one sentence; empty when it can."""
    if not (FOLDER / "torchvision").is_dir():
        return "torchvision is not under the virtual environment's peers folder: make test puts it there"
    tools = [tool for tool in ("gcc", "nm") if not shutil.which(tool)]
    if tools:
        return f"no {' and no '.join(tools)} here to make the two empty libraries that torchvision's wheel asks for"
    return ""


def load() -> ModuleType:
    """The torchvision module with its compiled operators. Raises RuntimeError, saying why, where it cannot be had."""
    if reason := missing():
        raise RuntimeError(reason)
    import torch  # noqa: F401  its libraries come first

    compiled = FOLDER / "torchvision" / "_C.so"
    names = subprocess.run(["nm", "-D", "--undefined-only", compiled], capture_output=True, text=True, check=True)
    wanted = re.findall(r" U (_Z\w*4cuda\w*)$", names.stdout, re.MULTILINE)
    data = [name for name in wanted if name.endswith("9allocatorE")]
    source = "".join(f"void *{n};\n" if n in data else f"void {n}(void) {{}}\n" for n in wanted)
    for runtime in sorted((FOLDER / "torchvision.libs").glob("libcudart*")):
        ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as folder:
        for library, text in (("libc10_cuda.so", source), ("libtorch_cuda.so", "")):
            path = Path(folder) / library
            command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{library}", "-x", "c", "-", "-o", str(path)]
            subprocess.run(command, input=text, text=True, check=True)
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    sys.path.insert(0, str(FOLDER))
    import torchvision

    if not torchvision.extension._has_ops():
        raise RuntimeError("torchvision was imported without its compiled operators")
    return torchvision

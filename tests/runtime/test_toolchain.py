"""What there is to build with, and what is told where it is not enough."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from collectivex.backends.base import Facts, Recipe, Source
from collectivex.runtime import registry, toolchain
from collectivex.runtime.toolchain import Here

TORCH = {"version": "2.11.0+cu130", "cuda": "13.0", "hip": None, "arch": None, "ccl": []}
RECIPES = [name for name in registry.names() if registry.load(name).facts.recipe is not None]
NVCC = """\
#!/bin/sh
case "$1" in
    --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
    --list-gpu-code) printf 'sm_90\\nsm_100\\n' ;;
esac
"""


def toolkit(folder: Path, release: str = "13.0") -> Path:
    for name in ("bin", "include"):
        (folder / name).mkdir(parents=True)
    (folder / "include" / "cuda_runtime.h").touch()
    (folder / "bin" / "nvcc").write_text(NVCC.format(release=release))
    (folder / "bin" / "nvcc").chmod(0o755)
    return folder


def lacks(at: Here, **more) -> list[str]:
    recipe = Recipe(needs=("nvcc",), **more)
    facts = Facts("lib", "Lib", Source("git", "u", "p", "w"), (), ("cuda",), recipe=recipe)
    return list(toolchain.lacks(facts, recipe, at, at.names(Path("/lib"), Path("/cache"))))


@pytest.mark.parametrize(
    ("arch", "told"),
    [
        ("sm90", "9.0"),
        ("sm_90", "9.0"),
        ("9.0", "9.0"),
        ("sm103", "10.3"),
        ("sm_90a", "9.0"),
        ("gfx942",) * 2,
    ],
)
def test_an_architecture_has_one_spelling(arch: str, told: str) -> None:
    """SKU files say sm90, torch (9, 0), its builds 9.0; AMD's names are what they are."""
    assert toolchain.capability(arch) == told


def test_the_toolkit_is_where_nvcc_and_its_headers_are(tmp_path: Path, monkeypatch) -> None:
    """A wrapper called nvcc is no toolkit; a link to the real one leads there; CUDA_HOME comes first."""
    real, other = toolkit(tmp_path / "cuda"), toolkit(tmp_path / "other")
    wrapper, linked = tmp_path / "wrap" / "bin", tmp_path / "linked"
    wrapper.mkdir(parents=True)
    linked.mkdir()
    (wrapper / "nvcc").write_text("#!/bin/sh\n")
    (wrapper / "nvcc").chmod(0o755)
    (linked / "nvcc").symlink_to(real / "bin" / "nvcc")
    monkeypatch.delenv("CUDA_HOME", raising=False)

    monkeypatch.setenv("PATH", str(wrapper))
    assert toolchain.cuda_home() != tmp_path / "wrap"
    monkeypatch.setenv("PATH", str(linked))
    assert toolchain.cuda_home() == real
    monkeypatch.setenv("CUDA_HOME", str(other))
    assert toolchain.cuda_home() == other


def test_a_build_has_one_toolkit_one_compiler_and_the_pools_architecture(tmp_path: Path, monkeypatch) -> None:
    """The distribution's g++ everywhere, whatever conda set; what torch's packages bring comes last."""
    site = tmp_path / "site-packages"
    (site / "nvidia" / "cu13" / "include").mkdir(parents=True)
    for name, value in (
        ("CXX", "conda-g++"),
        ("NVCC_PREPEND_FLAGS", "-ccbin=conda"),
        ("CPATH", "/mine"),
        ("PIP_CONSTRAINT", "/image.txt"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MAX_JOBS", "3")
    at = Here(
        {**TORCH, "file": f"{site}/torch/__init__.py"}, Path("/cuda"), "/usr/bin/gcc", "/usr/bin/g++", "9.0"
    )
    env = toolchain.build_environment(
        Recipe(build={"CPATH": "{folder}/in:$CPATH"}), at, at.names(Path("/l"), Path("/c"))
    )

    for name in ("CXX", "CUDAHOSTCXX", "NVCC_CCBIN"):
        assert env[name] == "/usr/bin/g++"
    assert (env["CC"], env["NVCC_PREPEND_FLAGS"], env["PIP_CONSTRAINT"]) == ("/usr/bin/gcc", "", "")
    assert (env["CUDA_HOME"], env["CUDACXX"]) == ("/cuda", "/cuda/bin/nvcc")
    assert (env["TORCH_CUDA_ARCH_LIST"], env["MAX_JOBS"]) == ("9.0", "3")
    assert env["PATH"].startswith("/cuda/bin:")
    assert env["CPATH"] == f"/l/in:/cuda/include:/cuda/include/cccl:/mine:{site}/nvidia/cu13/include"


def test_a_toolkit_that_does_not_fit_is_told_with_what_it_is(tmp_path: Path) -> None:
    """The wrong CUDA, an unknown GPU, no GPU to ask, another GPU than the pool's, no toolkit at all."""
    cuda, old = toolkit(tmp_path / "cuda"), toolkit(tmp_path / "old", "12.8")

    def at(arch: str | None, cuda: Path | None = cuda, own: str | None = None) -> Here:
        return Here({**TORCH, "arch": own}, cuda, "gcc", "g++", arch)

    assert lacks(at("9.0", own="9.0")) == []
    assert lacks(at("9.0", old)) == [f"an nvcc of CUDA 13, as torch's ({old} is 12.8)"]
    assert lacks(at("12.0")) == ["an nvcc that knows architecture 12.0"]
    assert lacks(at(None)) == ["the architecture to build for (no GPU here: name the pool with --sku)"]
    (mismatch,) = lacks(at("9.0", own="10.0"))
    assert mismatch == "a GPU of the pool's architecture (this one is 10.0, the pool's are 9.0)"
    assert lacks(at("9.0"), headers=("infiniband/no-such.h",)) == ["infiniband/no-such.h"]
    assert lacks(at("9.0"), links={"nccl": "{ccl_include}"}) == [f"nccl.h, from {toolchain.WHERE['nccl.h']}"]


def test_no_toolkit_is_told_as_nvcc(monkeypatch, tmp_path: Path) -> None:
    """With who brings it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lacks(Here(TORCH, None, "gcc", "g++", "9.0")) == ["nvcc, from the CUDA toolkit"]


def test_torch_is_asked_in_a_process_of_its_own(monkeypatch, tmp_path: Path) -> None:
    """What it is and which NCCL it maps; one that cannot be imported is an answer too."""
    here = toolchain.ask_torch()
    assert (here["version"], here["file"]) == (torch.__version__, torch.__file__)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13 is not there')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert toolchain.ask_torch() == {"error": "ImportError: libcudart.so.13 is not there"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete_and_exact(name: str) -> None:
    """Exact pins, no name in braces that nobody fills, something to check, and NCCL where it is demanded."""
    facts = registry.load(name).facts
    recipe = facts.recipe
    if recipe.same_as is not None:
        assert recipe == Recipe(same_as=recipe.same_as)
        assert registry.load(recipe.same_as).facts.source.pin == facts.source.pin
        return
    at = Here({**TORCH, "ccl": ["/n/lib/libnccl.so.2"]}, Path("/cuda"), "gcc", "/usr/bin/g++", "9.0")
    names = at.names(Path("/libraries/x"), Path("/cache/x"))
    texts = [*recipe.packages, *recipe.links.values(), *recipe.build.values(), *recipe.sets.values()]
    texts += [word for step in recipe.steps for word in step]
    texts += [entry for entries in recipe.prepend.values() for entry in entries]
    filled = [text.format(**names) for text in texts]
    assert not any("{" in text for text in filled)
    assert all("==" in package for package in recipe.packages)
    assert recipe.modules or recipe.programs
    assert "git" in recipe.needs if recipe.git else recipe.packages
    if recipe.nccl is not None:
        assert f"nvidia-nccl-cu13=={recipe.nccl}" in filled
    assert not {"PYTHONPATH", *recipe.prepend} & set(recipe.sets), (
        "a search path is prepended, never replaced"
    )


def test_every_library_has_a_recipe_or_needs_none() -> None:
    """What has none is told to be built by hand."""
    without = {n for n in registry.names() if registry.load(n).facts.recipe is None}
    assert {n for n in without if registry.load(n).facts.source.kind != "bundled"} == {"rccl_tests"}

"""Packaging. Beside the package it puts `solopo_plugin.pth`, the interpreter-start hook, into site-packages."""

import base64
import hashlib
import re
import zipfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent
HOOK = "solopo_plugin.pth"
HOME = None  # address of the public repository, such as https://github.com/OWNER/solopo (CONTRIBUTING.md, A release)


class BuildWithHook(build_py):
    """Wheels: put the hook beside the package."""

    def run(self):
        """Build, then copy the hook to where the package lies."""
        super().run()
        if not self.editable_mode:
            self.copy_file(str(ROOT / HOOK), str(Path(self.build_lib) / HOOK))

    def get_outputs(self, include_bytecode=1):
        """Name the hook among the files of the wheel."""
        own = [] if self.editable_mode else [str(Path(self.build_lib) / HOOK)]
        return [*super().get_outputs(include_bytecode), *own]


class EditableWithHook(editable_wheel):
    """`pip install -e`: setuptools puts no extra files into an editable wheel, so the finished one gets the hook."""

    def run(self):
        """Build the editable wheel, then put the hook and its line of RECORD into it."""
        super().run()
        wheel = max(Path(self.dist_dir).glob("*.whl"), key=lambda p: p.stat().st_mtime)
        with zipfile.ZipFile(wheel) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        hook = (ROOT / HOOK).read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(hook).digest()).rstrip(b"=").decode()
        record = next(name for name in content if name.endswith(".dist-info/RECORD"))
        content[HOOK] = hook
        content[record] = f"{HOOK},sha256={digest},{len(hook)}\n".encode() + content[record]
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)


def long_description() -> str:
    """Return the README with links that work on a package index: where there is no `HOME`, paths in place of links."""

    def absolute(match):
        picture, text, target = match.groups()
        if "://" in target:
            return match[0]
        if HOME:
            return f"{picture}[{text}]({HOME}/{'raw' if picture else 'blob'}/main/{target})"
        return "" if picture else f"{text} (`{target}`)"

    return re.sub(r"(!?)\[([^\]]+)\]\(([^)\s]+)\)", absolute, (ROOT / "README.md").read_text(encoding="utf-8"))


setup(
    name="solopo",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "solopo_plugin/__init__.py").read_text()).group(1),
    description="Short-to-long preference optimization (SoLoPO) as a training stage of LLaMA-Factory",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The solopo contributors",
    url=HOME,
    keywords=["LLaMA-Factory", "preference optimization", "long context", "DPO", "ORPO", "SimPO", "SoLoPO"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["solopo_plugin", "solopo_plugin.*"]),
    # annotations are for type checkers of others, too; templates are the pages' HTML, style sheets and scripts
    package_data={"solopo_plugin": ["py.typed", "**/templates/*"]},
    install_requires=[
        "llamafactory==0.9.5",  # the host; patches are checked against this version
        # one build of the three: pip alone picks a torch that has no torchaudio, and the host then cannot start
        "torch==2.11.*",
        "torchvision==0.26.*",
        "torchaudio==2.11.*",
        "trl>=0.20,<=0.24.0",  # older ones do not import beside transformers 5
        "transformers>=5.0,<=5.6.0",
        "pyyaml",  # recipes
        "httpx",  # sampling from OpenAI-compatible servers; the host brings it along
        "ijson>=3.2",  # questions in large JSON files, row by row; no dependency of its own, wheels for all platforms
        # imported here, too; the host brings them along and its bounds hold
        *(
            "accelerate",
            "datasets",
            "gradio",
            "huggingface_hub",
            "jinja2",
            "matplotlib",
            "numpy",
            "omegaconf",
            "pandas",
            "peft",
            "pyarrow",
            "pydantic",
            "safetensors",
            "scipy",
            "tqdm",
        ),
    ],
    extras_require={
        # builds from source: DS_BUILD_OPS=0 pip install --no-build-isolation ".[deepspeed]"
        "deepspeed": ["deepspeed>=0.18,<0.20", "ninja"],  # ZeRO-2/3; ninja builds its kernels on first use
        "data": ["bm25s>=0.3"],  # `distractors: bm25` in a data recipe; needs numpy and scipy alone
        # .pdf, .html and .docx files in a folder of documents; Markdown and plain text need nothing
        "documents": ["pdfminer.six>=20250506", "markdownify>=1.0", "beautifulsoup4>=4.12", "mammoth>=1.11"],
        # `harness_tasks` of an evaluation: the Open LLM Leaderboard's own program; its IFEval and MATH need more
        "eval": ["lm-eval[api,hf,ifeval,math]>=0.4.13,<0.5"],
        "flash-attn": ["flash-attn>=2.7"],  # `flash_attn: fa2` in a recipe; compiles against the installed torch
        "vllm": ["vllm>=0.20.2,<0.26"],  # sampling of preference pairs; these releases are built for torch 2.11
        "qlora": ["bitsandbytes>=0.45"],  # `quantization_bit: 4`, as in the LoRA recipe
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",  # two files of tests at a time
            "hypothesis",
            "deepspeed>=0.18,<0.20",
            "build",
            "bm25s>=0.3",
            "pdfminer.six>=20250506",
            "markdownify>=1.0",
            "mammoth>=1.11",
            "lm-eval[api,hf,ifeval,math]>=0.4.13,<0.5",
        ],
        # `make quality`: lint and format, spelling, types, and whether an index would take the package
        "quality": ["ruff", "codespell", "mypy", "types-PyYAML", "types-tqdm", "build", "twine", "pre-commit"],
        # drives Debian's Chromium through LlamaBoard; a page that loads too slowly is given a second try
        "test-web": ["playwright", "pytest-rerunfailures"],
    },
    cmdclass={"build_py": BuildWithHook, "editable_wheel": EditableWithHook},
    zip_safe=False,
)

"""README and docs/ name only what exists, their tables are complete, and their commands run."""

import contextlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ALONE, ROOT, read_logs, run, run_in_process, run_script, small_flags, write_class_folders
from PIL import Image

import datasets
import evaluate
import losses
import main
from report import ablation
from run import options
from run.history import LOGS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
BLOCKS = [(name, block) for name, text in TEXTS.items() for block in FENCED.findall(text)]
COMMANDS = [
    (name, line.split("  #")[0].rstrip())
    for name, block in BLOCKS
    for line in re.sub(r"\\\n\s*", " ", block).splitlines()
    if re.match(r"(OMP_NUM_THREADS=1 )?(python|bash|torchrun|srun) ", line)
]
FOREIGN = {"--standalone", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"}
FOREIGN |= {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--logdir", "--dist", "--check"}
FOREIGN |= {"--shm-size"}
"""Flags of torchrun, Slurm, TensorBoard, pytest, Docker, and of ruff format."""


def flags_of(parser):
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


def all_flags():
    """Return the flags of all commands; those of benchmarks and of datasets.py as their sources name them."""
    sources = [*(ROOT / "benchmarks").glob("*.py"), ROOT / "datasets.py"]
    in_sources = {flag for path in sources for flag in re.findall(r'add_argument\("(--\w+)"', path.read_text())}
    parsers = (main.get_args_parser(), evaluate.get_args_parser(), ablation.get_args_parser())
    return set().union(in_sources, FOREIGN, *map(flags_of, parsers))


def anchors(text):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_every_flag_exists(name):
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", TEXTS[name])) - all_flags() == set()


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        assert page.exists(), target
        assert not anchor or anchor in anchors(page.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_of_the_repository_exists(name):
    files = r"(?:main|losses|netlib|googlenet|datasets|evaluate|auxiliaries)\.py"
    rooms = r"(?:support|data|run|report|docs|tests|benchmarks)/[\w./*]*"
    for path in re.findall(rf"(?<![\w/.])(?:{files}|{rooms})", TEXTS[name]):
        path = path.rstrip("./")
        assert list(ROOT.glob(path)) or (ROOT / f"{path}.py").exists(), path  # a module without its ending


@pytest.mark.parametrize("name", TEXTS)
def test_every_file_of_an_option_exists(name):
    for path in re.findall(r"-[rc] (\S+\.txt)", TEXTS[name]):
        assert (ROOT / path).exists(), path


def test_every_page_is_linked_and_links_back():
    linked = {target.partition("#")[0] for target in re.findall(r"\]\((docs/[^)\s]+)\)", TEXTS["README.md"])}
    assert {name for name in TEXTS if name != "README.md"} <= linked
    assert all("(../README.md)" in text.split("\n## ")[0] for name, text in TEXTS.items() if name != "README.md")
    assert TEXTS["README.md"].count("\n") <= 200


def test_the_table_of_flags_is_complete():
    table = TEXTS["docs/training.md"].split("| theme | flags |")[1].split("\n\n")[0]
    named = re.findall(r"`(--\w+)`", table)
    assert len(named) == len(set(named))
    assert set(named) == flags_of(main.get_args_parser()) - {"--help"}


def test_losses_and_samplers_are_described():
    section = TEXTS["docs/training.md"].split("\n## Losses\n")[1].split("\n## ")[0]
    assert {*losses.LOSSES, *losses.SAMPLERS} <= set(re.findall(r"`(\w+)`", section))


def test_the_table_of_columns_is_complete(own_run):
    rows = re.findall(r"^\| (`log_.*?) \| (.*) \|$", TEXTS["docs/training.md"], re.M)
    logs = read_logs(own_run)
    described = {name: columns for names, columns in rows for name in re.findall(r"`(\S+\.csv)`", names)}
    assert set(described) == set(logs) == set(LOGS.values())
    for name, columns in described.items():
        wanted = {column.replace("<factor>", "light") for column in re.findall(r"`([^`]+)`", columns)}
        wanted -= {"Test ", "Time"}  # what stands in front of others; read_logs leaves times out
        if "Recall @ k" in wanted:
            wanted = (wanted - {"Recall @ k"}) | {f"Recall @ {k}" for k in (1, 2, 4, 8)}
        if name == LOGS["probe"]:
            wanted |= {f"Test {column}" for column in wanted if "Mined" not in column and column != "Epochs"}
        assert set(logs[name]) == wanted, name


def test_the_files_of_a_run_are_described(own_run):
    block = next(block for name, block in BLOCKS if "├── checkpoint.pth.tar" in block)
    described = set(re.findall(r"^[├└]── (\S+)", block, re.M))
    described -= {"network.svg", "tensorboard"}
    assert {path.name for path in own_run.iterdir()} - {".lock"} == described


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """The folder of a run on a data set "mine" with known factors, in the folder where commands are tried."""
    top = tmp_path_factory.mktemp("first hour")
    images = write_class_folders(top / "Datasets" / "mine") / "images"
    names = [f"{path.parent.name}/{path.name}" for path in sorted(images.glob("*/*"))]
    lines = [f"{name},{'left' if i % 2 else 'right'}" for i, name in enumerate(names)]
    (images.parent / "factors.csv").write_text("\n".join(["image,light", *lines]))
    more = (*ALONE, "--dataset", "mine", "--savename", "NAME", "--n_epochs", 2, "--eval_shared")
    return run(small_flags(top / "Datasets", top / "Training_Results", *more))


def test_commands_name_programs_and_flags_that_fit():
    assert len(COMMANDS) > 30
    for name, command in COMMANDS:
        words = shlex.split(re.sub(r"\.\.\.|\[|\]|\$\(|\)", "", command))
        program = next(word for word in words if word.endswith((".py", ".sh")) or word == "pytest")
        assert program == "pytest" or (ROOT / program).exists(), (name, command)
        parsers = {"main.py": main.get_args_parser(), "evaluate.py": evaluate.get_args_parser()}
        if program in parsers and "--help" not in words:
            _, unknown = parsers[program].parse_known_args(words[words.index(program) + 1 :])
            assert not unknown, (name, command)


def commands_marked_as_runnable():
    """Return the commands in blocks behind the comment <!-- runs -->."""
    marked = [block for text in TEXTS.values() for block in re.findall(r"<!-- runs -->\n```\n(.*?)```", text, re.S)]
    return [line.split("  #")[0].strip() for block in marked for line in block.splitlines()]


def test_commands_are_marked_as_runnable():
    assert len(commands_marked_as_runnable()) >= 10


@pytest.mark.parametrize("command", commands_marked_as_runnable())
def test_a_command_marked_as_runnable_runs_at_its_smallest_size(own_run, monkeypatch, command):
    for package, mark in (("timm", "timm/"), ("pytorch_metric_learning", "pml/")):
        if mark in command:
            pytest.importorskip(package)
    monkeypatch.chdir(own_run.parent.parent.parent)
    _, program, *argv = shlex.split(command.replace("FOLDER", "Datasets/mine/images/class_00"))
    if program == "main.py" and "--help" not in argv and "--resume" not in argv:
        argv = small_flags("Datasets", "Training_Results", *argv, "--savename", f"doc{len(command)}", "--n_epochs", 1)
    if "--compile" in argv:  # takes minutes
        argv.remove("--compile")
    with pytest.raises(SystemExit, match="^0$") if "--help" in argv else contextlib.nullcontext():
        run(argv, {"main.py": main, "evaluate.py": evaluate}[program])
    for left in Path().glob("*.npz"):
        left.unlink()


PYTHON = [(name, code) for name, text in TEXTS.items() for code in re.findall(r"```python\n(.*?)```", text, re.S)]
RECIPES = [code for name, code in PYTHON if name == "docs/data.md"]
PYTHON = [(name, code) for name, code in PYTHON if name != "docs/data.md"]


@pytest.mark.parametrize(("name", "code"), PYTHON, ids=[name for name, _ in PYTHON])
def test_python_in_the_docs_runs(own_run, tmp_path, name, code):
    images = own_run.parent.parent.parent / "Datasets" / "mine" / "images"
    run([own_run, "--embed", images, "--save_embeddings", tmp_path / "new.npz"], evaluate)
    shutil.copy(images / "class_00" / "0.jpg", tmp_path / "bird.jpg")
    shutil.copytree(own_run, tmp_path / "run")
    code = re.sub(r"Training_Results/[\w/-]+", "run", code).replace("test_transform(224)", "test_transform(32)")
    (tmp_path / "snippet.py").write_text(code)
    done = run_in_process(run_script, tmp_path / "snippet.py", [], tmp_path, tmp_path / "output")
    assert done.returncode == 0, done.stderr


def test_python_is_found_in_the_docs():
    assert len(PYTHON) >= 2
    assert len(RECIPES) == 1


def test_the_recipe_for_a_list_makes_one_that_is_read(tmp_path, monkeypatch, capsys):
    images = tmp_path / "Datasets" / "mine" / "all"
    images.mkdir(parents=True)
    for name in ("Banana", "Red Apple", "Fig", "Kiwi_2"):
        for ending in ("01.jpg", "02.JPG"):
            Image.new("L", (8, 8), 40).save(images / f"{name}_{ending}")
    (images / "._Fig_01.jpg").write_bytes(b"of another system")
    (images / "cover.jpg").touch()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a second time, the list of the first is there
        exec(RECIPES[0], {})
        assert capsys.readouterr().out == "8 images, 1 other names: ['all/cover.jpg']\n"
    train, tests = datasets.load_dataset("mine", "Datasets")
    assert (train.class_names, tests["test"].class_names) == (["Banana", "Fig"], ["Kiwi_2", "Red Apple"])
    assert (len(train), len(tests["test"])) == (4, 4)


def test_the_list_in_the_docs_is_read(tmp_path):
    block = next(block for name, block in BLOCKS if name == "docs/data.md" and block.startswith("image,class,split"))
    root, rows = tmp_path / "mine", block.splitlines()
    rows += [row.replace("ann", other) for other in ("eve", "ian") for row in rows[1:3]]
    rows += ["photos/ian_3.png,ian,val,top", "photos/bob_2.png,bob,test,front", "photos/joe_1.png,joe,test,front"]
    rows = [row.replace("train", "test") if ",ian," in row else row for row in rows]
    (root / "photos").mkdir(parents=True)
    (root / "images.csv").write_text("\n".join(rows))
    for row in rows[1:]:
        Image.new("L", (8, 8)).save(root / row.split(",")[0])
    train, tests = datasets.load_dataset("mine", tmp_path)
    assert (train.class_names, tests["test"].class_names) == (["ann", "eve"], ["bob", "ian", "joe"])


@pytest.mark.parametrize("name", ["demo", "cub200"])
def test_the_set_ups_that_the_readme_starts_are_there(name):
    assert f"bash Result_Runs.sh {name}" in TEXTS["README.md"]
    script = ["bash", str(ROOT / "Result_Runs.sh"), "flags", name]
    printed = subprocess.run(script, capture_output=True, text=True, check=True)
    options.check(main.get_args_parser().parse_args(printed.stdout.split()), main.get_args_parser())


def is_kept(path):
    """Tell whether a file or folder of the top level belongs to the repository, with git or without it."""
    ignored = {".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split())}
    if path.name in ignored or (path / "pyvenv.cfg").exists():
        return False
    files = path.rglob("*") if path.is_dir() else [path]
    return any(file.is_file() and not ignored & set(file.relative_to(ROOT).parts) for file in files)


def test_the_repository_map_is_complete():
    block = next(block for name, block in BLOCKS if name == "README.md" and "main.py  " in block)
    named = set(re.findall(r"^(\S+)", block, re.M))
    top = {path.name + "/" * path.is_dir() for path in ROOT.iterdir() if is_kept(path)}
    apart = {"README.md", "LICENSE", "requirements.txt", "constraints.txt", "pyproject.toml", ".ci/"}
    apart |= {".gitignore", ".gitattributes"}
    assert named == top - apart


def test_requirements_name_no_marker_that_pip_cannot_compare():
    texts = TEXTS | {name: (ROOT / name).read_text() for name in ("requirements.txt", "constraints.txt")}
    kernels = re.compile("platform_(release|version)")  # pip 24.1 to 25.3 end in a traceback where it is no version
    assert not [name for name, text in texts.items() if kernels.search(text)]


def test_a_clone_on_windows_has_the_line_ends_that_shells_need(tmp_path):
    (tmp_path / "here").mkdir()
    for name in (".gitattributes", "Result_Runs.sh"):
        shutil.copy(ROOT / name, tmp_path / "here")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "core.autocrlf=true"]
    for command in (["init"], ["add", "."], ["commit", "-m", "first"], ["clone", ".", tmp_path / "clone"]):
        subprocess.run([*git, *command], cwd=tmp_path / "here", check=True, capture_output=True)
    assert (tmp_path / "clone" / "Result_Runs.sh").read_bytes() == (ROOT / "Result_Runs.sh").read_bytes()

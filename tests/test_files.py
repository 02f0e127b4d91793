"""Files and folders are written whole or not at all, whatever ends the process; one run has a folder for itself."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import timm_lean.checkpoint
from timm_lean.checkpoint.files import atomic_dir, atomic_file, lock_dir
from timm_lean.errors import LeanError, OutputError

# Processes that need nothing else of the package import these files without torch, which takes seconds.
LIGHT = f"""
import sys, types
for name, path in (('timm_lean', {timm_lean.__path__}), ('timm_lean.checkpoint', {timm_lean.checkpoint.__path__})):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
"""


def python(code: str, *args: object) -> subprocess.Popen:
    """A process that runs the code and talks by lines."""
    return subprocess.Popen(
        [sys.executable, '-c', code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob('*')) if p.is_file()}


def write(folder: Path, text: str) -> None:
    with atomic_dir(folder) as new:
        (new / 'a').write_text(text)
        (new / 'sub').mkdir()
        (new / 'sub' / 'b').write_text(text)


def test_a_folder_is_replaced_and_other_files_stay(tmp_path):
    write(tmp_path / 'd', 'old')
    (tmp_path / 'd' / 'mine').write_text('mine')
    (tmp_path / 'd').chmod(0o750)
    write(tmp_path / 'd', 'new')
    assert tree(tmp_path) == {'d/a': 'new', 'd/sub/b': 'new', 'd/mine': 'mine'}
    assert os.listdir(tmp_path) == ['d'] and (tmp_path / 'd').stat().st_mode & 0o777 == 0o750


def test_a_failure_changes_nothing(tmp_path):
    write(tmp_path / 'd', 'old')
    with pytest.raises(KeyError), atomic_dir(tmp_path / 'd') as new:
        (new / 'a').write_text('new')
        raise KeyError('x')
    with pytest.raises(KeyError), atomic_file(tmp_path / 'd' / 'a') as new:
        new.write_text('new')
        raise KeyError('x')
    assert tree(tmp_path) == {'d/a': 'old', 'd/sub/b': 'old'}


def test_a_failed_exchange_puts_the_old_folder_back_or_the_new_one(tmp_path, monkeypatch):
    """The disk fails once, at each of the renames."""
    rename = os.rename
    for fail_at in range(4):
        write(tmp_path / 'd', 'old')
        (tmp_path / 'd' / 'mine').write_text('mine')
        calls = []

        def failing(source, target, calls=calls, fail_at=fail_at):
            calls.append(source)
            if len(calls) == fail_at + 1:
                raise OSError(5, 'Input/output error')
            rename(source, target)
        monkeypatch.setattr(os, 'rename', failing)
        try:
            write(tmp_path / 'd', 'new')
        except OutputError:
            assert fail_at < 3
        monkeypatch.setattr(os, 'rename', rename)
        text = (tmp_path / 'd' / 'a').read_text()
        assert tree(tmp_path) == {'d/a': text, 'd/sub/b': text, 'd/mine': 'mine'}


KILLED_AT_RENAME = LIGHT + """
import os, signal, sys
from pathlib import Path
from timm_lean.checkpoint.files import atomic_dir
rename, left = os.rename, [int(sys.argv[2])]
def killing(source, target):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    rename(source, target)
os.rename = killing
with atomic_dir(sys.argv[1]) as new:
    (new / 'a').write_text('new')
    (new / 'sub').mkdir()
    (new / 'sub' / 'b').write_text('new')
"""


def test_a_killed_exchange_is_finished_by_the_next_writer(tmp_path):
    for killed_at in range(3):
        parent = tmp_path / str(killed_at)
        write(parent / 'd', 'old')
        (parent / 'd' / 'mine').write_text('mine')
        process = python(KILLED_AT_RENAME, parent / 'd', killed_at)
        assert process.wait(60) == -signal.SIGKILL
        assert [p for p in os.listdir(parent) if p != 'd'], 'the killed process should leave its temporary folder'
        with lock_dir(parent):
            text = (parent / 'd' / 'a').read_text()
            assert text == ('old' if killed_at == 0 else 'new')
            assert tree(parent) == {'d/a': text, 'd/sub/b': text, 'd/mine': 'mine'}
            assert os.listdir(parent) == ['d']


WRITE_AND_WAIT = LIGHT + """
import sys
from timm_lean.checkpoint.files import atomic_file
with atomic_file(sys.argv[1]) as temporary:
    temporary.write_text('half')
    print('half', flush=True)
    sys.stdin.readline()
    temporary.write_text('whole')
"""


def test_leftovers_go_and_what_a_living_process_writes_stays(tmp_path):
    killed, living = python(WRITE_AND_WAIT, tmp_path / 'a'), python(WRITE_AND_WAIT, tmp_path / 'b')
    assert killed.stdout.readline() == living.stdout.readline() == 'half\n'
    killed.kill()
    killed.wait()
    (tmp_path / '.mine.tmp').mkdir()
    (tmp_path / '.lean-file.tmp').touch()
    with atomic_file(tmp_path / 'c') as temporary:
        temporary.write_text('c')
    assert sum(p.is_dir() for p in tmp_path.glob('.lean-*.tmp')) == 1
    living.communicate('\n', timeout=60)
    assert tree(tmp_path) == {'.lean-file.tmp': '', 'b': 'whole', 'c': 'c'}
    assert (tmp_path / '.mine.tmp').is_dir()


LOCK_AND_FORK = LIGHT + """
import os, sys, time
from timm_lean.checkpoint.files import lock_dir
with lock_dir(sys.argv[1]):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    sys.stdin.readline()
"""


def test_a_second_run_in_one_folder_is_refused_until_the_first_ends(tmp_path):
    process = python(LOCK_AND_FORK, tmp_path / 'run')
    child = int(process.stdout.readline())
    try:
        with pytest.raises(LeanError, match=r'run is in use by another run'), lock_dir(tmp_path / 'run'):
            pass
        process.kill()
        process.wait()
        with lock_dir(tmp_path / 'run'):  # though a process it forked lives on
            os.kill(child, 0)
        assert os.listdir(tmp_path / 'run') == []
    finally:
        os.kill(child, signal.SIGKILL)


FULL_DISK = """
import resource, sys, timm, torch, timm_lean
from timm_lean.checkpoint.files import atomic_file
from timm_lean.training.state import save_state
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
model = timm.create_model('resnet20_cifar')
folder = Path(sys.argv[1])
def plain():
    with atomic_file(folder / 'plain') as temporary:
        temporary.write_bytes(bytes(200_000))
for attempt in (lambda: timm_lean.save_model(model, folder / 'm.safetensors'), plain,
                lambda: timm_lean.checkpoint.save_hf_dir(model, folder / 'hf'),
                lambda: save_state(folder, model.state_dict())):
    try:
        attempt()
    except timm_lean.errors.OutputError as e:
        print(e)
"""


def test_a_full_disk_is_one_line_and_keeps_the_old_file(tmp_path):
    """A limit on the size of files stands in for the disk: writing fails in the same places, by another number."""
    for name in ('plain', 'm.safetensors', 'resume.pt'):
        (tmp_path / name).write_text('old')
    write(tmp_path / 'hf', 'old')
    before = tree(tmp_path)
    out, _ = python(FULL_DISK, tmp_path).communicate(timeout=120)
    lines = out.splitlines()
    assert len(lines) == 4 and all(line.startswith('Cannot write') and 'File too large' in line for line in lines), out
    assert tree(tmp_path) == before and len(os.listdir(tmp_path)) == 4


def test_the_current_folder_is_not_taken_away(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LeanError, match='current folder'), atomic_dir('.'):
        pass

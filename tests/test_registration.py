"""When PEFT knows our methods: whoever imports what first, and however PEFT is found."""

import json
import pickle
import subprocess
import sys
import types

import peft
import pytest

import flora
from flora import registration

REGISTERED = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as table; print(sorted(NAMES - table.keys()))"
NAMES = "NAMES = {'FLORA', 'LORA_FLAT', 'LOTR', 'LOCON_TUCKER', 'VPT', 'BOTTLENECK', 'FLORA_FLAT', 'OFT_MENDED'}; "


# Imports what PEFT imports, and runs each piece of code in a fork, which has only PEFT and flora left to import.
NURSERY = """
import json, os, sys, tempfile, traceback
import accelerate, torch, torch.distributed.tensor, transformers
import transformers.modeling_utils, transformers.models.bloom.modeling_bloom
assert not {'peft', 'flora'} & sys.modules.keys()
for code in map(json.loads, sys.stdin):
    said = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]
    if not (child := os.fork()):
        for number, file in enumerate(said, start=1):
            os.dup2(file.fileno(), number)
        status = 0
        try:
            exec(code, {'__name__': '__main__'})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = [file.seek(0) or file.read().decode() for file in said]
    print(json.dumps([status, *texts]), flush=True)
"""


def alone(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.fixture(scope="module")
def run():
    """Run code where neither PEFT nor flora has been imported."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", NURSERY], text=True, **pipes) as nursery:

        def call(code: str) -> subprocess.CompletedProcess[str]:
            print(json.dumps(code), file=nursery.stdin, flush=True)
            return subprocess.CompletedProcess(code, *json.loads(nursery.stdout.readline()))

        yield call
        nursery.stdin.close()


@pytest.mark.parametrize(
    "code",
    [
        "import flora; import peft",
        "import peft; import flora",
        "import flora.adapters.config",
        "import flora.methods.rivals.lotr",
        "import flora, importlib.util; importlib.util.find_spec('peft'); import peft",
        "import flora, importlib, peft; importlib.reload(peft)",
        "import sys; sys.modules['peft'] = None; import flora; del sys.modules['peft']; import peft",
    ],
)
def test_methods_are_registered_whatever_is_imported_first(code, run):
    done = run(f"{NAMES}{code}; {REGISTERED}")
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_methods_are_registered_in_a_process_of_its_own():
    done = alone(f"{NAMES}import flora; import peft; {REGISTERED}")
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_importing_flora_imports_neither_peft_nor_torch():
    done = alone(
        "import sys, flora; print([name for name in ('peft', 'torch', 'transformers') if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]"


def test_registering_imports_only_what_peft_has_imported():
    heavy = "('hydra', 'wandb', 'timm', 'datasets', 'lycoris', 'sklearn')"
    done = alone(f"import sys, peft, flora; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout.strip() == "[]"


def test_asking_whether_peft_is_there_imports_nothing():
    done = alone(
        "import flora, importlib.util, sys; print(importlib.util.find_spec('peft') is not None, 'peft' in sys.modules)"
    )
    assert done.stdout.strip() == "True False"


OTHER_FINDER = """
import sys
from importlib.machinery import PathFinder
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, FOLDERS) if name == 'peft' else None
FOLDERS, real = list(sys.path), PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, path=None, target=None: real(name, path, target)
                                   if name != 'peft' or path is not None else None)
sys.meta_path.append(Editable)
"""


def test_peft_may_be_found_by_a_finder_of_its_own_as_an_editable_install_is(run):
    done = run(f"{OTHER_FINDER}\n{NAMES}\nimport flora, peft\n{REGISTERED}")
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_threads_that_import_peft_at_once_see_every_method():
    # Not in a fork: PEFT's own import fails there in a third of the cases, without flora as well.
    code = f"""
import importlib, threading
import flora
names = ['peft', 'flora', 'peft', 'peft.tuners.lora', 'peft']
threads = [threading.Thread(target=importlib.import_module, args=[name]) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join()
{NAMES}
{REGISTERED}
"""
    done = alone(code)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_pickled_configuration_brings_its_method_along(run):
    data = pickle.dumps(flora.FloraConfig(r=3))
    done = run(f"import pickle; print(pickle.loads({data!r}).r)")
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.parametrize("version", ["0.20.0", "0.19.9", "0.3"])
def test_older_versions_of_peft_are_refused(version):
    other = types.SimpleNamespace(__version__=version)
    with pytest.raises(ImportError, match=rf"^flora needs peft>=0.21, found {version}; install a newer version"):
        registration.is_newer(other)


@pytest.mark.parametrize("version", ["0.21.0", "0.21.9", "0.21.3.dev0", peft.__version__])
def test_the_tested_series_is_accepted_silently(version):
    assert not registration.is_newer(types.SimpleNamespace(__version__=version))


NEWER = "import peft, peft.utils.hotswap, peft.tuners.tuners_utils as base; peft.__version__ = '0.23.0'; "


def test_a_newer_peft_with_the_same_interfaces_is_warned_of_once(run):
    done = run(f"{NAMES}{NEWER} import flora, flora.adapters; peft.PeftModel; {REGISTERED}")
    assert done.stdout.strip() == "[]", done.stderr
    assert done.stderr.count("flora was tested with peft>=0.21,<0.22; peft 0.23.0 has the same interfaces") == 1
    assert done.stderr.count("Warning") == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("del base.BaseTuner._check_merge_allowed", "overrides _check_merge_allowed, which is gone"),
        ("del base.BaseTunerLayer._get_embed_scale", "BaseTunerLayer._get_embed_scale is gone"),
        ("del base.check_target_module_exists", "cannot import name 'check_target_module_exists'"),
        ("del peft.utils.hotswap._convert_scalings_to_tensor", "_convert_scalings_to_tensor"),
        (
            "base.BaseTuner._replace_module = lambda self, parent, name, new_module, child, device: None",
            "BaseTuner._replace_module takes device",
        ),
        (
            "import abc; base.BaseTuner._plan = abc.abstractmethod(lambda self: None); "
            "base.BaseTuner.__abstractmethods__ |= {'_plan'}",
            "Model lacks _plan",
        ),
    ],
)
def test_a_newer_peft_that_changed_is_one_line_that_names_what(change, named, run):
    done = run(f"{NEWER}\n{change}\nimport flora")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: flora was tested with peft>=0.21,<0.22; peft 0.23.0 changed what it builds on ("
    )
    assert named in last


@pytest.mark.parametrize("order", ["import flora, peft", "import peft, flora"])
def test_a_peft_without_any_of_it_is_one_clear_line(order, tmp_path, run):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("__version__ = '0.30.0'")
    done = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {order}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: flora was tested with peft>=0.21,<0.22; peft 0.30.0 changed what it builds on (No module named"
    )

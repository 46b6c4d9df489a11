"""Secrets stay out of all that a process leaves: records, what lies beside weights, logs, lines and a sweep's files."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import train
from flora.config import composed, semantic_config
from flora.launch.entry import main
from flora.secrets import unspoken, without_secrets
from tests.launch.test_sweep import TINY, needs
from tests.results.test_store import record as made_record

PASSWORD, TYPED, SHORT = "hunter2hunter2", "c0ffeec0ffee", "s3cr3t"
QUICK = (*TINY, "model.image_size=32", "trainer.max_steps=1", "trainer.device=cpu")


@pytest.fixture
def run(tmp_path, monkeypatch, script):
    """Run train.py in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*words):
        flags = [word for word in words if word.startswith("-")]  # Hydra wants them first
        overrides = [*QUICK, *(word for word in words if word not in flags)]
        return script(partial(main, train.job, trace=lambda: False), "train.py", *flags, *overrides)

    return call


def files_with(folder, *secrets):
    """Files in which one of them stands in clear."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]


def test_secrets_of_the_environment_are_replaced_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", PASSWORD)
    monkeypatch.setenv("HOME_PAGE", "not a secret at all")
    node = {"a": [f"x {PASSWORD} y", 3], "b": {"c": "not a secret at all"}}
    assert without_secrets(node) == {"a": ["x <MY_PASSWORD> y", 3], "b": {"c": "not a secret at all"}}


@pytest.mark.parametrize("name", ["DB_PASS", "PGPASS", "GITHUB_PAT", "SSH_PASSPHRASE", "API_BEARER", "MYSQL_PWD"])
def test_names_of_variables_that_end_as_a_secret_does(monkeypatch, name):
    monkeypatch.setenv(name, PASSWORD)
    assert without_secrets(f"cannot log in with {PASSWORD}") == f"cannot log in with <{name}>"
    monkeypatch.setenv(name, SHORT)
    assert without_secrets(f"cannot log in with {SHORT}") == f"cannot log in with <{name}>"


def test_words_and_folders_that_a_variable_holds_are_no_secrets(monkeypatch, tmp_path):
    for name, value in {"AWS_SECRET_ACCESS_KEY": "test", "A_TOKEN": "1000", "DATA_KEY": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    text = f"split test of 1000 images in {tmp_path}"
    assert without_secrets(text) == text


def test_secrets_of_the_config_are_replaced_by_their_name():
    node = {"api_key": "abcdefgh1", "hf_token": "x", "tokenizer": "bert-base-cased", "eos_token": "</s>"}
    assert without_secrets(node) == {**node, "api_key": "<secret>", "hf_token": "<secret>"}
    command = "python train.py +model.api_key=abcdefgh1 task.hub_token=abcdefgh2 model.tokenizer=bert-base-cased"
    shown = "python train.py +model.api_key=<secret> task.hub_token=<secret> model.tokenizer=bert-base-cased"
    assert without_secrets(command) == shown
    assert without_secrets({"overrides": ["+wandb_password=abcdefgh3", "seed=1"]}) == {
        "overrides": ["+wandb_password=<secret>", "seed=1"]
    }
    assert without_secrets({"credentials": {"user": "me"}, "api_keys": ["a", ""]}) == {
        "credentials": {"user": "<secret>"},
        "api_keys": ["<secret>", ""],
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("+db_pass=abc", "+db_pass=<secret>"),
        ("+passphrase=open sesame, now", "+passphrase=<secret>"),
        ("+password='open sesame'", "+password=<secret>"),
        ("+x.api_key=a,b", "+x.api_key=<secret>"),
        ("auth={token: abc, user: me}", "auth={token: <secret>, user: me}"),
        ('{"hf_token": "abc"}', '{"hf_token": <secret>}'),
        ("logger:\n  pat: abc\n  mode: online", "logger:\n  pat: <secret>\n  mode: online"),
        ('hydra.launcher.setup=["export HF_TOKEN=abc"]', 'hydra.launcher.setup=["export HF_TOKEN=<secret>"]'),
        ("https://me:abc@host/x?token=abc&y=1", "https://<secret>@host/x?token=<secret>&y=1"),
        ("https://abc@host/x?sig=abc%3D&y=1", "https://<secret>@host/x?sig=<secret>&y=1"),
        ("+api_key=${oc.env:NONE,abc}", "+api_key=<secret>"),
        ("+api_key=${oc.env:NAME}", "+api_key=${oc.env:NAME}"),
        ("+http.passcode=abc", "+http.passcode=<secret>"),
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer <secret>"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic <secret>"),
        ('{"Authorization": "token abcdef"}', '{"Authorization": <secret>}'),
        ("Set-Cookie: a=b; c=d", "Set-Cookie: <secret>"),
        ("run --password abc --seed 1", "run --password <secret> --seed 1"),
        ("curl -token 'a b' x", "curl -token <secret> x"),
        ("password: |\n  one\n\n  two\nseed: 1", "password: <secret>\nseed: 1"),
        ("a:\n  api_key: >-\n    one\n  b: 2\n", "a:\n  api_key: <secret>\n  b: 2\n"),
        ("passphrase: open sesame, now\nseed: 1", "passphrase: <secret>\nseed: 1"),
        ("api_keys:\n- one\n- two\nseed: 1", "api_keys: <secret>\nseed: 1"),
        ("secrets:\n  one: two\nseed: 1", "secrets: <secret>\nseed: 1"),
        ("+api_keys=[a,b]", "+api_keys=<secret>"),
        ("clientSecret=abc", "clientSecret=<secret>"),
    ],
)
def test_a_text_is_shown_without_what_it_assigns(text, shown):
    assert without_secrets(text) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    "name",
    [
        *("DB_PASS", "PGPASS", "DB_PASSWD", "PASSWORD", "SSH_PASSPHRASE", "MYSQL_PWD", "GITHUB_PAT"),
        *("API_BEARER", "SESSION", "APP_SESSION", "PIN", "CARD_PIN", "PRIVATE", "SSH_PRIVATE"),
        *("COOKIE", "AUTH_COOKIE", "JWT", "SECRET", "CLIENT_SECRET", "CREDENTIALS", "TOKEN"),
        *("HF_TOKEN", "ACCESS_KEY", "APIKEY", "OTP", "SENTRY_DSN", "AZURE_SAS", "HUB_AUTH"),
        *("AWS_SECRET_ACCESS_KEY", "SECRET_KEY_2"),
    ],
)
def test_names_of_secrets_wherever_they_name_a_value(monkeypatch, name):
    low = name.lower()
    assert without_secrets({low: "abc"}) == {low: "<secret>"}
    assert without_secrets(f"+x.{low}=abc") == f"+x.{low}=<secret>"
    assert without_secrets(f"export {name}=abc; ls") == f"export {name}=<secret>; ls"
    assert without_secrets(f"x:\n  {low}: abc") == f"x:\n  {low}: <secret>"
    assert without_secrets(["run", f"--{low}", "abc", "x"]) == ["run", f"--{low}", "<secret>", "x"]
    monkeypatch.setenv(name, PASSWORD)
    assert without_secrets(f"no {PASSWORD}!") == f"no <{name}>!"


@pytest.mark.parametrize(
    "token",
    [
        *(f"hf_{'a1' * 17}", f"ghp_{'a1' * 18}", f"gho_{'a1' * 18}", f"github_pat_{'a1' * 11}_{'b2' * 20}"),
        *(f"glpat-{'a1' * 10}", f"npm_{'a1' * 18}", f"sk-proj-{'a1' * 12}", f"AIza{'a1' * 17}-", f"AKIA{'A1' * 8}"),
        *("xoxb-123456789012-abcdef", "xoxp-1234567890-ab", f"pypi-{'Ag' * 20}", "eyJhbGciOi.eyJzdWIiOi.s1-_"),
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_tokens_whose_form_gives_them_away(token):
    assert without_secrets(f"cannot read {token}, it says") == "cannot read <secret>, it says"


def test_a_number_is_a_secret_under_the_name_of_a_password_only():
    node = {"pin": 1234, "passcode": 5678, "sort_key": 3, "pin_memory": True, "image_token": 32000}
    assert without_secrets(node) == node | {"pin": "<secret>", "passcode": "<secret>"}


def test_no_field_of_the_suite_is_called_like_a_secret():
    config = semantic_config(composed(["task=glue", "adapter=flora", "logger=wandb"]))
    for group in Path("configs").rglob("*.yaml"):
        text = group.read_text()
        assert without_secrets(text) == text, group
    record = dataclasses.asdict(made_record()) | {"config": config}
    assert without_secrets(record) == json.loads(json.dumps(record))


@pytest.mark.parametrize(
    "value",
    [
        *("accuracy", "mean_per_class_accuracy", "finished", "vtab1k", "cifar10", "fp32", "bf16"),
        *("efficientnet_lite0", "linear_probe", "1e-3", "0.001", "32", "adapter_model.safetensors"),
        *("trainable_params", "validation", "2026"),
    ],
)
def test_a_word_that_results_hold_is_no_secret(monkeypatch, value):
    monkeypatch.setenv("A_KEY", value)
    node = {value: [value, f"test {value} 0.5"]}
    assert without_secrets(node) == node


@pytest.mark.parametrize("value", [SHORT, "12345678", "correcthorsebattery", "accuracy1x", "a b c d e"])
def test_a_value_that_no_result_holds_is_one(monkeypatch, value):
    monkeypatch.setenv("A_KEY", value)
    assert without_secrets(f"with {value} of x9{value[:3]}") == f"with <A_KEY> of x9{value[:3]}"


@pytest.mark.parametrize(
    "text",
    [
        *(
            "pin_memory: true",
            "the session: started",
            "bypass=1",
            "disk-based-learning-of-2-things",
            "--seed 1 --tokens 3",
        ),
        *("key: value", "trainer.keys=3", "basic authentication failed", "the private: it", "a--password b"),
        *("+api_key=${oc.env:HF_TOKEN}", "model.share_att_key=true", "adapter.num_tokens=10", "+hub_token=null"),
        *("it holds a secret: put it elsewhere", "credentials: none"),
        *("the forward pass: nan", "full_key: model.x", "token recognition error at: '('", "train.py model.path=a"),
    ],
)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_a_run_leaves_no_secret_in_any_file_or_line(run, tmp_path, monkeypatch, logger):
    monkeypatch.setenv("SITE_PASS", PASSWORD)
    words = [f"+api_key={TYPED}", f"+note={PASSWORD}", f"table={PASSWORD}", f"cell={PASSWORD}", f"logger={logger}"]
    code, out, err = run(*words)
    assert code == 0, err
    assert files_with(tmp_path, PASSWORD, TYPED) == []
    card = next(tmp_path.glob("outputs/*/adapter/README.md")).read_text()
    assert "+api_key=<secret> +note=<SITE_PASS>" in card
    assert not any(secret in out + err for secret in (PASSWORD, TYPED))


def test_a_data_set_of_that_name_is_masked_beside_the_weights_too(run, tmp_path, monkeypatch):
    from tests.tasks.imagefolder.folders import photographs

    monkeypatch.setenv("SITE_PASS", PASSWORD)
    photographs(tmp_path / "data" / PASSWORD)
    code, _, err = run("task=imagefolder", f"task.dataset={PASSWORD}", "trainer.batch_size=4")
    assert code == 0, err
    assert files_with(tmp_path / "outputs", PASSWORD) == files_with(tmp_path / "results", PASSWORD) == []
    facts = json.loads(next(tmp_path.glob("outputs/*/adapter/run.json")).read_text())
    assert facts["dataset"] == "<SITE_PASS>"


def test_lines_about_errors_and_printed_configs_show_none(run, monkeypatch):
    monkeypatch.setenv("SITE_PASS", PASSWORD)
    code, _, err = run(f"paths.output=/dev/null/{PASSWORD}")
    assert code == 2
    assert "<SITE_PASS>" in err
    assert PASSWORD not in err
    code, out, _ = run(f"+api_key={TYPED}", f"+note={PASSWORD}", "--cfg=job")
    assert code == 0
    assert "note: <SITE_PASS>" in out
    assert not any(secret in out for secret in (PASSWORD, TYPED))


def test_the_trace_of_an_unforeseen_error_shows_none():
    code = (
        f"from flora.secrets import unspoken\nwith unspoken():\n    raise KeyError('{PASSWORD[:7]}' + '{PASSWORD[7:]}')"
    )
    ended = subprocess.run([sys.executable, "-c", code], env={"A_PASS": PASSWORD}, capture_output=True, text=True)
    assert ended.stderr.strip().splitlines()[-1] == "KeyError: '<A_PASS>'"
    assert PASSWORD not in ended.stderr


def test_streams_are_as_before_after_a_program(capsys):
    before = sys.stdout, sys.stderr
    with unspoken():
        print("+api_key=abc")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "+api_key=<secret>\n"


@pytest.mark.parametrize(
    "words",
    [
        [f"+api_key={TYPED}"],
        [f"+note={PASSWORD}"],
        [f"+hydra.job.env_set.SITE_PASS={SHORT}"],
        [f"+auth={{token: {SHORT}}}", "hydra/launcher=joblib"],
    ],
)
def test_a_sweep_refuses_secrets_among_its_overrides(run, tmp_path, monkeypatch, words):
    monkeypatch.setenv("SITE_PASS", PASSWORD)
    code, _, err = run("-m", "seed=0,1", *words)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("error: a sweep writes its overrides to disk, and ")
    put = "holds a secret: put it in a variable of the environment and give ${oc.env:NAME} in its place"
    assert err.rstrip().endswith(put)
    assert not any(secret in err for secret in (PASSWORD, TYPED, SHORT))
    assert list(tmp_path.iterdir()) == []


def test_hydra_is_not_asked_to_write_a_secret_of_one_run(run, tmp_path):
    code, _, err = run(f"+api_key={TYPED}", "hydra.output_subdir=.hydra")
    assert code == 2
    assert "error: hydra.output_subdir has overrides written to disk" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "launcher", ["basic", *(pytest.param(name, marks=pytest.mark.slow) for name in ("joblib", "submitit_local"))]
)
def test_a_sweep_has_secrets_of_the_environment_and_leaves_none(run, tmp_path, monkeypatch, launcher):
    needs(launcher.removesuffix("_local"))
    monkeypatch.setenv("SITE_PASS", PASSWORD)
    reference = "${oc.env:SITE_PASS}"
    words = [f"+api_key={reference}", f"paths.output=outputs_{reference}", f"hydra/launcher={launcher}"]
    code, _, err = run("-m", *words, "hydra.sweep.dir=sweep")
    assert code == 0, err
    assert [path.name for path in tmp_path.glob("outputs_*")] == [f"outputs_{PASSWORD}"], "the run had the real value"
    assert "multirun.yaml" in {path.name for path in (tmp_path / "sweep").iterdir()}
    assert files_with(tmp_path, PASSWORD) == []
    assert PASSWORD not in err

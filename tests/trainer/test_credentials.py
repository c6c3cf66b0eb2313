"""No password, key or token is in a file that a command leaves, or in what it prints."""

from __future__ import annotations

import base64
import importlib.util
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest

from siftclip.trainer.demo.pool import DemoData

Cli = Callable[..., subprocess.CompletedProcess[str]]

USER, PASSWORD = "alice", "Wonder+land%2F4242"  # as it stands in a URL
TOKEN, SIGNATURE = "Tok3n-of-the-header", "S1gnature%2Bof%2Fthe%3Dquery"
SECRETS = (PASSWORD, TOKEN, SIGNATURE)
HEADER = f"+pool.storage_options.client_kwargs.headers.X-Token={TOKEN}"


class Guarded(SimpleHTTPRequestHandler):
    """Serves a folder, and ranges of its files, to whoever has password, token and signature."""

    refused: list[str]

    def send_head(self) -> Any:
        login = base64.b64encode(f"{USER}:{unquote(PASSWORD)}".encode()).decode()
        signatures = parse_qs(urlsplit(self.path).query).get("sig", [])
        allowed = (
            self.headers.get("Authorization") == f"Basic {login}"
            and self.headers.get("X-Token") == TOKEN
            and signatures in ([], [unquote(SIGNATURE)])
        )
        if not allowed:
            self.refused.append(self.path)
            self.send_error(401)
            return None
        return super().send_head()

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not file.is_file():
            return super().do_GET()
        first, last = map(int, asked.groups())
        data, size = file.read_bytes()[first : last + 1], file.stat().st_size
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string(int(file.stat().st_mtime)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def log_message(self, *args: Any) -> None:
        """Be quiet."""


@pytest.fixture
def refused() -> list[str]:
    """Paths that were asked for without what is needed."""
    return []


@pytest.fixture
def place(demo_data: DemoData, refused: list[str]) -> Iterator[str]:
    """Host and port of the server of the pool."""
    handler = type("Handler", (Guarded,), {"refused": refused})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(demo_data.pool)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def options(base: list[str], place: str, tmp_path: Path) -> list[str]:
    kept = [o for o in base if not o.startswith(("pool.root=", "pool.cache_dir="))]
    root = f"pool.root=http://{USER}:{PASSWORD}@{place}"
    return [*kept, root, HEADER, f"pool.cache_dir={tmp_path / 'cache'}"]


def forms(secret: str) -> set[bytes]:
    """A secret as it may be written: quoted or not, and anywhere inside of base64."""
    texts = {secret, unquote(secret), quote(secret, safe=""), quote(unquote(secret), safe="")}
    encoded = set()
    for text in {secret, unquote(secret)}:
        for shift in range(3):  # the characters in common with neighbours left out
            part = base64.b64encode(b"\0" * shift + text.encode()).rstrip(b"=")
            encoded.add(part[4 if shift else 0 : -1])
    return {text.encode() for text in texts} | encoded


def leaks(folder: Path, printed: str) -> list[str]:
    """Files of a folder that hold a secret, and `printed`."""
    wanted = set().union(*map(forms, SECRETS))
    contents = {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    contents["printed"] = printed.encode()
    return [name for name, content in contents.items() if any(f in content for f in wanted)]


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    for number, text in enumerate((f"x{unquote(PASSWORD)}y", quote(TOKEN), f"alice:{PASSWORD}")):
        (tmp_path / f"{number}").write_text(text)
        (tmp_path / f"{number}.64").write_bytes(base64.b64encode(text.encode()))
    assert len(leaks(tmp_path, "")) == 6
    assert leaks(tmp_path / "nothing", TOKEN) == ["printed"]


@pytest.mark.slow
def test_a_full_run_leaves_no_secret(
    options: list[str],
    refused: list[str],
    demo_data: DemoData,
    model_folder: Path,
    cli: Cli,
    tmp_path: Path,
) -> None:
    tasks = [f"eval.root={demo_data.tasks}", "eval.tasks=[digit]"]
    run = tmp_path / "run"
    wandb, there = "logger=wandb", importlib.util.find_spec
    loggers = [f"logger.{name}=true" for name in ("tensorboard", "mlflow") if there(name)]
    loggers += [
        wandb,
        "logger.samples=2",
        "logger.artifacts=[selection,model,evaluation,report,tables]",
    ]
    loggers += [f"logger.notes=from http://{USER}:{PASSWORD}@{TOKEN}"]
    model = f"features.model.name={model_folder}"
    embedding = ["features=open_clip", "features.root=null", "features.name=own", model]
    arm = '+compare.arms.mine=["selector=random","+pool.storage_options.headers.X-Token=' + TOKEN
    commands: list[list[str]] = [
        ["index", *options],
        ["embed", *options, *embedding],
        ["score", *options],
        ["select", *options],
        ["select", "--multirun", *options, "seed=0,1", "hydra.output_subdir=.hydra"],
        ["train", *options, *tasks, *loggers, f"run_dir={run}", "data.num_workers=1"],
        ["train", *options, wandb, f"run_dir={run}"],
        ["eval", str(run), *tasks, f"output_dir={tmp_path / 'outputs'}"],
        ["eval", "watch", str(run), *tasks, "watch.once=true", wandb],
        [
            "export",
            f"export.source={run}",
            "export.format=local_dir",
            f"export.path={tmp_path / 'hf'}",
        ],
        ["compare", *options, *tasks, wandb, "compare.arms={}", f'{arm}"]', "compare.name=c"],
        ["data", "compact", *options, f"compact.output={tmp_path / 'copy'}"],
        ["data", "bench", *options, "bench.samples=24", "bench.steps=2"],
        ["train", "--cfg", "job", *options],
        ["train", "--cfg", "job", "--resolve", *options],
        ["train", "--cfg", "all", *options],
    ]
    for command in commands:
        result = cli(*command)
        assert leaks(tmp_path, result.stdout + result.stderr) == [], command
        assert result.returncode == 0, (command, result.stderr[-3000:])
    assert refused == []
    written = (run / "config.yaml").read_text()
    assert "root: http://***@127.0.0.1" in written
    assert "X-Token: '***'" in written
    assert list(run.glob("wandb/*/*.wandb"))
    assert list(tmp_path.rglob("multirun.yaml"))


def test_faults_show_no_secret(
    options: list[str], place: str, refused: list[str], cli: Cli, tmp_path: Path
) -> None:
    wrong = [o for o in options if not o.startswith("pool.root=")]
    pools = {
        "another password": f"pool.root=http://{USER}:{PASSWORD}x@{place}",
        "no such folder": f"pool.root=http://{USER}:{PASSWORD}@{place}/none",
        "no server": f"pool.root=http://{USER}:{PASSWORD}@127.0.0.1:1",
        "no host": f"pool.root=https://{USER}:{PASSWORD}@nowhere.invalid/?token={SIGNATURE}",
        "chained": f"pool.root=simplecache::http://{USER}:{PASSWORD}@{place}",
        "keys in s3": f"pool.root=s3://{USER}:{PASSWORD}@bucket/pool",
        "unknown": f"pool.root=nonsense://{USER}:{PASSWORD}@host/pool",
        "not a URL of Hydra": f"pool.root=http://{USER}:{PASSWORD}=,@{place}",
        "no option": f"pool.roots=http://{USER}:{PASSWORD}@{place}",
        "sftp": f"pool.root=sftp://{USER}:{PASSWORD}@127.0.0.1:1/x",
        "a list": f"pool.root=[http://{USER}:{PASSWORD}@{place}]",
        "no port": f"pool.root=http://{USER}:{unquote(PASSWORD)}@{place}",
        "no scheme": f"pool.root=//{USER}:{PASSWORD}@{place}",
        "ftp": f"pool.root=ftp://{USER}:{PASSWORD}@127.0.0.1:1/x",
    }
    for name, root in pools.items():
        result = cli("index", *wrong, root)
        assert result.returncode == 2, (name, result.stderr[-3000:])
        assert leaks(tmp_path, result.stdout + result.stderr) == [], (name, result.stderr)
    options_of_storage = [
        f"+pool.storage_options.client_kwargs.no_such={TOKEN}",
        f"pool.storage_options={TOKEN}",
        f"+pool.storage_options.{TOKEN[:0]}key={TOKEN},{PASSWORD}",
        f"pool.storage_options={{key:{TOKEN}=,secret:{PASSWORD}}}",
    ]
    for option in options_of_storage:
        result = cli("index", *options, option)
        assert result.returncode != 0, option
        assert leaks(tmp_path, result.stdout + result.stderr) == [], (option, result.stderr)


def test_credentials_come_from_fsspecs_own_configuration(
    options: list[str],
    place: str,
    refused: list[str],
    cli: Cli,
    new_cli: Cli,
    child_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    """And from the environment, as a reference to it; the index is then found as it is."""
    assert cli("index", *options).returncode == 0
    child_environment["FSSPEC_HTTP"] = (
        f'{{"client_kwargs": {{"headers": {{"X-Token": "{TOKEN}"}}}}}}'
    )
    child_environment["POOL_PASSWORD"] = PASSWORD
    kept = [o for o in options if o != HEADER and not o.startswith("pool.root=")]
    root = f"pool.root=http://{USER}:${{oc.env:POOL_PASSWORD}}@{place}"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.npz")}
    result = new_cli("index", *kept, root)
    assert (result.returncode, refused) == (0, []), result.stderr[-3000:]
    assert leaks(tmp_path, result.stdout + result.stderr) == []
    assert {path: path.stat().st_mtime_ns for path in before} == before
    shown = cli("index", *kept, root, "--cfg", "job").stdout
    assert f"root: http://{USER}:${{oc.env:POOL_PASSWORD}}@{place}" in shown


def test_a_file_of_the_user_is_not_copied_with_its_secrets(
    options: list[str], place: str, cli: Cli, tmp_path: Path, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("mine")
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\npool:\n"
        f"  root: http://{USER}:{PASSWORD}@{place}\n"
        f"  storage_options: {{client_kwargs: {{headers: {{X-Token: {TOKEN}}}}}}}\n"
    )
    kept = [o for o in options if o != HEADER and not o.startswith("pool.root=")]
    words = ["--config-dir", str(folder), *kept, "experiment=mine"]
    for more in (["--multirun", *words, "seed=0,1"], [*words, "hydra.output_subdir=.hydra"]):
        result = cli("index", *more)
        assert result.returncode == 0, result.stderr[-3000:]
        assert leaks(tmp_path, result.stdout + result.stderr) == []
    assert list(tmp_path.rglob("multirun.yaml"))
    assert list(tmp_path.rglob("overrides.yaml"))
    for part in ((), *(("--package", f"pool{rest}") for rest in ("", ".root", ".storage_options"))):
        for flags in (["--cfg", "job"], ["--cfg=job", "--resolve"]):
            result = cli("index", *words, *flags, *part)
            assert result.returncode == 0, result.stderr[-3000:]
            assert leaks(tmp_path, result.stdout + result.stderr) == [], (flags, part)
            assert "***" in result.stdout


def test_a_signature_goes_with_every_request(
    base: list[str], place: str, refused: list[str], demo_data: DemoData, cli: Cli, tmp_path: Path
) -> None:
    kept = [o for o in base if not o.startswith(("pool.root=", "pool.cache_dir="))]
    signed = f"?sv=2&sig={SIGNATURE}"
    for path in ("", "/shards/0000000{0..0}.tar"):
        root = f"pool.root='http://{USER}:{PASSWORD}@{place}{path}{signed}'"
        cache = f"pool.cache_dir={tmp_path / f'cache{len(path)}'}"
        result = cli("select", *kept, HEADER, root, cache, "selector=random", "overlap=false")
        assert (result.returncode, refused) == (0, []), result.stderr[-3000:]
        assert leaks(tmp_path, result.stdout + result.stderr) == []

"""Proxies: what needs the network names the variable. `test_ui.py` serves its page behind two."""

import os
import re
import subprocess
import sys

import httpx
import pytest

from imagen_scale.commands.doctor.finding import examined
from imagen_scale.data.encoder import encoder_folder
from imagen_scale.data.network import hub_reason, network_reason, without_proxies
from imagen_scale.errors import DataError, EnvironmentProblem

NOWHERE = "http://127.0.0.1:9"


def answered(code):
    request = httpx.Request("GET", "https://huggingface.co")
    return httpx.HTTPStatusError(
        "the answer", request=request, response=httpx.Response(code, request=request)
    )


def caused(error, cause):
    error.__cause__ = cause
    return error


REFUSED = caused(OSError("cannot find it"), httpx.ConnectError("[Errno 111] Connection refused"))


@pytest.mark.parametrize(
    ("error", "variables", "named"),
    [
        (REFUSED, {}, None),
        (REFUSED, {"HTTPS_PROXY": NOWHERE, "no_proxy": "x"}, "HTTPS_PROXY"),
        (REFUSED, {"ALL_PROXY": NOWHERE, "https_proxy": NOWHERE}, "https_proxy"),
        (REFUSED, {"all_proxy": NOWHERE, "http_proxy": NOWHERE}, "all_proxy"),
        (REFUSED, {"http_proxy": NOWHERE, "no_proxy": "*"}, None),  # the hub is asked over https
        (REFUSED, {"HTTPS_PROXY": ""}, None),
        (answered(404), {"HTTPS_PROXY": NOWHERE}, None),  # it was reached
        (answered(407), {"HTTPS_PROXY": NOWHERE}, "HTTPS_PROXY"),
        (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."),
         {"HTTPS_PROXY": NOWHERE, "ALL_PROXY": "socks5://127.0.0.1:9"}, "ALL_PROXY"),
        (ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."),
         {"HTTP_PROXY": "socks5h://127.0.0.1:9"}, "HTTP_PROXY"),
    ],
)  # fmt: skip
def test_the_variable_is_named_where_it_may_be_the_reason(error, variables, named):
    reason = network_reason(error, variables)
    assert ("through the proxy" in reason) == (named is not None)
    if named is not None:
        assert f"(through the proxy of {named}: correct it, or unset it)" in reason
    assert NOWHERE not in reason  # an address may hold a password


def test_the_hub_behind_a_proxy_that_is_not_there(tmp_path):
    code = "from imagen_scale.data.encoder import encoder_folder; encoder_folder('nobody/nothing')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HTTPS_PROXY": NOWHERE, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert "'nobody/nothing' is no local folder" in last
    assert re.search(r"Connection refused.*\(through the proxy of HTTPS_PROXY: correct", last), last


def test_a_hub_that_may_not_be_asked_is_no_matter_of_proxies(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", NOWHERE)  # the tests are offline
    with pytest.raises(DataError) as caught:
        encoder_folder("nobody/nothing")
    assert "through the proxy" not in str(caught.value)


def test_a_cache_of_the_hub_that_takes_nothing_is_named():
    def check():
        hub_reason(PermissionError(13, "Permission denied", "/hub/x"))

    with pytest.raises(EnvironmentProblem, match=r"set HF_HOME \(or IMAGEN_SCALE_CACHE\)"):
        check()
    assert examined("text encoder", check)[0].remedy.startswith("Set HF_HOME")


def test_proxies_are_hidden_for_a_while(monkeypatch):
    before = {"HTTPS_PROXY": NOWHERE, "all_proxy": "socks5://127.0.0.1:9", "No_Proxy": "x"}
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyError), without_proxies():
        assert not [name for name in os.environ if name.lower().endswith("_proxy")]
        raise KeyError
    assert before.items() <= os.environ.items()

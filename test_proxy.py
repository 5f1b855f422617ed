"""The same banners as in proxy.py, in the same order; at the end, the file itself."""

import ast
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import proxy

HERE = Path(proxy.__file__).parent
SOURCE = Path(proxy.__file__).read_text(encoding="utf-8")

thoroughly = settings(max_examples=300, deadline=None, database=None)


def table(names, rows):
    """Run a test once per row; a row begins with its reason, which is the test's id."""
    return pytest.mark.parametrize(
        names, [pytest.param(*row, id=why) for why, *row in rows]
    )


# == Errors ====================================================================


@table(
    "status, code, type",
    [
        ("a wrong body", 400, "invalid_type", "invalid_request_error"),
        ("a wrong key", 401, "invalid_api_key", "invalid_request_error"),
        ("an unknown model", 404, "model_not_found", "invalid_request_error"),
        ("a body too large", 413, None, "server_error"),
        ("calls too fast", 429, "rate_limit_exceeded", "requests"),
        ("no credit", 429, "insufficient_quota", "insufficient_quota"),
        ("a fault of ours", 500, "internal_error", "server_error"),
        ("a fault of Replicate's", 503, "upstream_unavailable", "server_error"),
    ],
)
def test_an_error_has_all_four_keys_and_openais_type(status, code, type):
    error = proxy.APIError(status, "No.", code=code)
    assert error.body == {
        "error": {"message": "No.", "type": type, "param": None, "code": code}
    }


def test_require_raises_only_where_the_condition_fails():
    proxy.require(True, "No.")
    with pytest.raises(proxy.APIError, match=r"No\.") as caught:
        proxy.require("", "No.", code="empty_array", param="stop")
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "empty_array", "stop")


def test_an_api_error_is_told_as_it_is():
    error = proxy.APIError(404, "No.")
    assert proxy.as_api_error(error) is error


def test_a_fault_of_ours_is_logged_and_described_no_further(caplog):
    error = proxy.as_api_error(KeyError("a detail"))
    assert "KeyError: 'a detail'" in caplog.text
    assert (error.status, error.headers) == (500, {"x-should-retry": "false"})
    assert error.body["error"] == {
        "message": "The proxy failed to handle this call; its log says more.",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


# == Settings ==================================================================

GOOD = proxy.Settings(replicate_api_token="r8_good", proxy_api_key="sk-good")


@table(
    "text, expected",
    [
        ("nothing", "", {}),
        ("plain", "A=b", {"A": "b"}),
        ("empty", "A=", {"A": ""}),
        ("spaces around", "  A = b c  ", {"A": "b c"}),
        ("export", "export A=b", {"A": "b"}),
        ("a key named export", "export=b", {"export": "b"}),
        ("single quotes", r"A='b \n $c # d'", {"A": r"b \n $c # d"}),
        ("double quotes", 'A="b # c"', {"A": "b # c"}),
        ("escapes", r'A="b\n\t\"\\\$c"', {"A": 'b\n\t"\\$c'}),
        ("empty quotes", "A=\"\"\nB=''", {"A": "", "B": ""}),
        ("a quote inside", "A=it's", {"A": "it's"}),
        ("an equals sign inside", "A=b=c", {"A": "b=c"}),
        ("a comment line", "# A=b\n  # C=d\n\n", {}),
        ("a comment after a value", "A=b # c", {"A": "b"}),
        ("a comment after quotes", "A='b' # c\nB=\"c\" # d", {"A": "b", "B": "c"}),
        ("a comment and no value", "A= # c", {"A": ""}),
        ("a number sign inside", "A=b#c", {"A": "b#c"}),
        ("a byte order mark", "\ufeffA=b", {"A": "b"}),
        ("Windows line ends", "A=b\r\nC='d'\r\n", {"A": "b", "C": "d"}),
        ("the last one counts", "A=b\nA=c", {"A": "c"}),
    ],
)
def test_an_env_file_is_read_as_shells_read_it(text, expected):
    assert proxy.read_env_file(text) == expected


@table(
    "line", [("no equals sign", "B"), ("no name", "=b"), ("a name with a dot", "B.C=d")]
)
def test_an_env_file_that_is_none_is_refused_by_line(line):
    with pytest.raises(proxy.ConfigError) as caught:
        proxy.read_env_file(f"A=b\n\n{line}\n")
    assert caught.value.problems == (
        "Line 3 of the env file is not of the form KEY=value.",
    )


def test_settings_come_from_the_environment():
    environ = {"PORT": " 8080 ", "HOST": "0.0.0.0", "LOG_LEVEL": "", "HOME": "/root"}
    assert proxy.Settings.from_environ(environ) == proxy.Settings(
        host="0.0.0.0", port=8080
    )


def test_settings_that_are_no_numbers_are_refused_together():
    with pytest.raises(proxy.ConfigError) as caught:
        proxy.Settings.from_environ({"PORT": "http", "MAX_BODY_BYTES": "25 MB"})
    assert caught.value.problems == (
        "PORT must be a number, not 'http'.",
        "MAX_BODY_BYTES must be a number, not '25 MB'.",
    )


NEITHER_SECRET_IS_REAL = (
    "REPLICATE_API_TOKEN is still the placeholder. "
    "Get one at https://replicate.com/account/api-tokens and put it into .env.",
    "PROXY_API_KEY is still the placeholder. "
    "Make one with: openssl rand -hex 32 and put it into .env.",
)
TOKEN, KEY = "your_replicate_api_token_here", "your_secure_proxy_api_key_here"


@table(
    "name, value, fault",
    [
        ("no token", "replicate_api_token", " ", "is missing."),
        ("a placeholder", "replicate_api_token", TOKEN, "is still the placeholder."),
        ("two lines", "replicate_api_token", "r8_a\nb", "has a character no header"),
        ("no key", "proxy_api_key", "", "is missing."),
        ("a comma and no key", "proxy_api_key", " , ", "is missing."),
        ("a placeholder too", "proxy_api_key", KEY, "is still the placeholder."),
        ("the second of two", "proxy_api_key", f"a,{KEY}", "is still the placeholder."),
        ("no ASCII", "proxy_api_key", "a,schlüssel", "has a character no header"),
        ("a port", "port", 65536, "must be a number from 0 to 65535."),
        ("a time", "prediction_timeout", 4, "must be a number from 5 to 86400."),
        ("a size", "max_body_bytes", 0, "must be a number from 1 to 2147483648."),
        ("a level", "log_level", "x", "must be one of DEBUG, INFO, WARNING, ERROR."),
        ("an address", "replicate_base_url", "api.x/v1", "must begin with https://"),
    ],
)
def test_check_says_one_sentence_per_problem(name, value, fault):
    with pytest.raises(proxy.ConfigError) as caught:
        replace(GOOD, **{name: value}).check()
    [problem] = caught.value.problems
    assert problem.startswith(f"{name.upper()} {fault}")


def test_check_says_how_to_get_the_secrets():
    with pytest.raises(proxy.ConfigError) as caught:
        proxy.Settings(replicate_api_token=TOKEN, proxy_api_key=KEY).check()
    assert caught.value.problems == NEITHER_SECRET_IS_REAL


def test_check_tells_all_problems_at_once():
    with pytest.raises(proxy.ConfigError) as caught:
        proxy.Settings(port=-1, log_level="").check()
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "REPLICATE_API_TOKEN",
        "PROXY_API_KEY",
        "PORT",
        "LOG_LEVEL",
    ]


def test_there_may_be_several_keys():
    settings = replace(GOOD, proxy_api_key=" sk-one, sk-two,,")
    settings.check()
    assert settings.api_keys == ["sk-one", "sk-two"]


def test_settings_do_not_show_their_secrets():
    assert "good" not in repr(GOOD)


# == Catalogue =================================================================

VERSION = "0123456789abcdef" * 4
MODELS = {
    "mappings": {"gpt-4": "meta/llama-2-70b-chat", "mine": "deployments/me/mine"},
    "default_model": "meta/llama-2-7b-chat",
    "model_configs": {
        "meta/llama-2-7b-chat": {
            "max_tokens": 4096,
            "temperature_range": [0.1, 2.0],
            "supports_streaming": True,
        }
    },
}


def read_models(models, families=("o", "gpt", "llama", "claude")):
    return proxy.read_catalogue(json.dumps(models), families)


def test_a_file_in_the_old_form_works():
    catalogue = read_models(MODELS)
    assert catalogue.mappings == MODELS["mappings"]
    assert catalogue.default_model == "meta/llama-2-7b-chat"
    assert catalogue.configs == {
        "meta/llama-2-7b-chat": proxy.ModelConfig(4096, [0.1, 2.0], True)
    }


def test_every_key_may_be_left_out_and_comments_put_in():
    assert read_models({"_why": "a comment"}) == proxy.Catalogue({}, None, {})
    row = {"_why": "a comment", "family": "gpt", "input": {"top_k": 50}}
    assert read_models({"model_configs": {"a/b": row}}).configs == {
        "a/b": proxy.ModelConfig(family="gpt", input={"top_k": 50})
    }


@table(
    "id, ref",
    [
        ("a mapping", "gpt-4", "meta/llama-2-70b-chat"),
        ("a mapping to a deployment", "mine", "deployments/me/mine"),
        ("owner and name", "openai/gpt-5.2", "openai/gpt-5.2"),
        ("a version", f"me/x:{VERSION}", f"me/x:{VERSION}"),
        ("a version alone", VERSION, VERSION),
        ("a deployment", "deployments/me/x", "deployments/me/x"),
    ],
)
def test_a_name_is_found_by_mapping_or_by_form(id, ref):
    model = proxy.find_model(read_models(MODELS), id)
    assert (model.id, model.ref, model.is_default) == (id, ref, False)


def test_another_name_is_the_default_with_its_config():
    assert proxy.find_model(read_models(MODELS), "o9") == proxy.Model(
        "o9",
        "meta/llama-2-7b-chat",
        proxy.ModelConfig(4096, [0.1, 2.0], True),
        is_default=True,
    )


def test_another_name_is_unknown_where_there_is_no_default():
    with pytest.raises(proxy.APIError) as caught:
        proxy.find_model(read_models({}), "o9")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert str(caught.value) == (
        "The model `o9` does not exist or you do not have access to it. Use a name that"
        " GET /v1/models lists, or a model of Replicate as owner/name."
    )


HOSTILE = """/ /name owner/ ../x x/.. ./x .x/y -x/y a/b/c a/b/c/d a/b: a/b:c:d a/b:c/d
deployments/x deployments/x:y deployments/a/b/c deployments/a/b:c a/b%00 a%2f..%2fb/c
a/b?c a/b#c https://a/b mеta/llama"""  # that e is Cyrillic


@pytest.mark.parametrize(
    "id",
    [*HOSTILE.split(), "", "a b/c", "a/b\n", "a/b\r\nX-Evil: 1", "a/b\0"]
    + [VERSION[1:], VERSION.upper()],
)
def test_a_hostile_name_is_never_a_ref(id):
    with pytest.raises(proxy.APIError) as caught:
        proxy.find_model(read_models({}), id)
    assert caught.value.code == "model_not_found"


ROOT_KEYS = "default_model, mappings, model_configs"


@table(
    "models, path, expected",
    [
        ("no object", [], "$", "an object"),
        ("mappings", {"mappings": []}, "$.mappings", "an object"),
        ("a number", {"mappings": {"a": 5}}, '$.mappings["a"]', "owner/name"),
        ("no owner", {"mappings": {"a": "b"}}, '$.mappings["a"]', "owner/name"),
        ("a default", {"default_model": "b"}, "$.default_model", "owner/name"),
        ("configs", {"model_configs": []}, "$.model_configs", "an object"),
        ("a row", {"model_configs": {"a": 5}}, '$.model_configs["a"]', "an object"),
        ("an unknown key", {"model": {}}, "$.model", f"one of {ROOT_KEYS}"),
    ],
)
def test_a_wrong_file_is_refused_by_its_json_path(models, path, expected):
    with pytest.raises(proxy.ConfigError) as caught:
        read_models(models)
    assert caught.value.problems == (f"{path}: expected {expected}.",)


TWO_NUMBERS = "two numbers, the lower one first"
CONFIG_KEYS = "max_tokens, temperature_range, supports_streaming, family, input"


@table(
    "key, value, expected",
    [
        ("an unknown key", "tokens", 5, f"one of {CONFIG_KEYS}"),
        ("too few tokens", "max_tokens", 0, "a whole number from 1"),
        ("a boolean number", "max_tokens", True, "a whole number from 1"),
        ("half a range", "temperature_range", [1], TWO_NUMBERS),
        ("a range turned round", "temperature_range", [2, 1], TWO_NUMBERS),
        ("a boolean range", "temperature_range", [False, True], TWO_NUMBERS),
        ("a word", "supports_streaming", "no", "true or false"),
        ("an unknown family", "family", "bert", "one of o, gpt, llama, claude"),
        ("several families", "family", ["gpt"], "the name of a family"),
        ("a list", "input", [50], "an object"),
    ],
)
def test_a_wrong_config_is_refused_by_its_json_path(key, value, expected):
    with pytest.raises(proxy.ConfigError) as caught:
        read_models({"model_configs": {"a/b": {key: value}}})
    path = f'$.model_configs["a/b"].{key}'
    assert caught.value.problems == (f"{path}: expected {expected}.",)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1,}', "[" * 200_000])
def test_a_file_that_is_no_json_is_refused(text):
    with pytest.raises(proxy.ConfigError, match="^it is not JSON: "):
        proxy.read_catalogue(text, ())


def write(path, models, seconds):
    path.write_text(json.dumps(models), encoding="utf-8")
    os.utime(path, (seconds, seconds))


def test_an_edit_takes_effect_with_the_next_call(tmp_path):
    path = tmp_path / "models.json"
    write(path, {"mappings": {"a": "b/c"}}, seconds=1000)
    file = proxy.CatalogueFile(str(path), ())
    assert file.current() == proxy.Catalogue({"a": "b/c"}, None, {}, created=1000)
    assert file.current() is file.current()
    write(path, {"mappings": {"a": "b/d"}}, seconds=2000)
    assert file.current() == proxy.Catalogue({"a": "b/d"}, None, {}, created=2000)


def test_a_wrong_edit_is_logged_once_and_changes_nothing(tmp_path, caplog):
    path = tmp_path / "models.json"
    write(path, {"mappings": {"a": "b/c"}}, seconds=1000)
    file = proxy.CatalogueFile(str(path), ())
    good = file.current()
    write(path, {"mappings": {"a": "b"}}, seconds=2000)
    assert file.current() is file.current() is good
    assert caplog.messages == [
        f'{path} can\'t be used: $.mappings["a"]: expected owner/name. '
        "The models read before it stay."
    ]
    path.unlink()
    assert file.current() is good
    write(path, {"mappings": {"a": "b/d"}}, seconds=3000)
    assert file.current().mappings == {"a": "b/d"}


def test_a_wrong_file_at_the_start_is_told_by_its_name(tmp_path):
    with pytest.raises(proxy.ConfigError, match="none.json can't be used: "):
        proxy.CatalogueFile(str(tmp_path / "none.json"), ())


def test_the_models_that_are_shipped_can_be_asked():
    shipped = proxy.CatalogueFile(str(HERE / "models.json"), proxy.FAMILIES).current()
    promised = {
        "gpt-3.5-turbo": "meta/llama-2-7b-chat",
        "gpt-3.5-turbo-16k": "meta/llama-2-7b-chat",
        "text-davinci-003": "meta/llama-2-7b-chat",
        "text-davinci-002": "meta/llama-2-7b-chat",
        "gpt-4": "meta/llama-2-70b-chat",
        "gpt-4-turbo": "meta/llama-2-70b-chat",
        "gpt-4-32k": "meta/llama-2-70b-chat",
    }
    assert shipped.mappings.items() >= promised.items()
    refs = {*shipped.mappings.values(), shipped.default_model, *shipped.configs}
    unknown = {
        ref for ref in refs if proxy.find_family(proxy.Model("", ref)) is proxy.PLAIN
    }
    assert not unknown


# == Parameters ================================================================

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}


def saying(content, role="user"):
    return {"messages": [{"role": role, "content": content}]}


MISSING, UNSUPPORTED = "missing_required_parameter", "unsupported_parameter"
TEXT = {"type": "text", "text": "What is it?"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1"}]}
IN_PARTS, FORMAT = "messages[0].content", "response_format"
INCLUDE, NESTED = "include_usage", "stream_options.include_usage"


def refusal_of(body, params):
    with pytest.raises(proxy.APIError) as caught:
        proxy.check(body, params)
    assert caught.value.status == 400
    return caught.value


@table(
    "given, code, param",
    [
        ("no messages", {"messages": None}, MISSING, "messages"),
        ("no role", {"messages": [{}]}, MISSING, "messages[0].role"),
        ("no content", saying(None), MISSING, "messages[0].content"),
        ("no type", saying([TEXT, {}]), MISSING, "messages[0].content[1].type"),
        ("a text", {"messages": "Hello"}, "invalid_type", "messages"),
        ("no message", {"messages": [None]}, "invalid_type", "messages[0]"),
        ("an object", saying({}), "invalid_type", "messages[0].content"),
        ("a part", saying(["a"]), "invalid_type", "messages[0].content[0]"),
        ("an image", saying([TEXT, IMAGE]), "invalid_value", f"{IN_PARTS}[1].type"),
        ("an unknown role", saying("", "boss"), "invalid_value", "messages[0].role"),
        ("a text as a number", {"top_p": "1"}, "invalid_type", "top_p"),
        ("a boolean as a number", {"top_p": True}, "invalid_type", "top_p"),
        ("a boolean as an integer", {"seed": True}, "invalid_type", "seed"),
        ("a decimal as an integer", {"seed": 7.0}, "invalid_type", "seed"),
        ("an integer as a boolean", {"stream": 1}, "invalid_type", "stream"),
        ("a number to stop at", {"stop": ["a", 5]}, "invalid_type", "stop[1]"),
        ("a nested one", {"stream_options": {INCLUDE: 1}}, "invalid_type", NESTED),
        ("too low a decimal", {"top_p": -1}, "decimal_below_min_value", "top_p"),
        ("too high", {"seed": 2**63}, "integer_above_max_value", "seed"),
        ("too low", {"seed": -(2**63) - 1}, "integer_below_min_value", "seed"),
        ("as high as can be", {"n": 10**400}, UNSUPPORTED, "n"),
        ("several choices", {"n": 2}, UNSUPPORTED, "n"),
        ("true is not 1", {"n": True}, UNSUPPORTED, "n"),
        ("0 is not false", {"logprobs": 0}, UNSUPPORTED, "logprobs"),
        ("JSON", {"response_format": {"type": "json_object"}}, UNSUPPORTED, FORMAT),
        ("sound", {"modalities": ["text", "audio"]}, UNSUPPORTED, "modalities"),
        ("tools", {"messages": [CALLED]}, UNSUPPORTED, "messages[0].tool_calls"),
    ],
)
def test_check_refuses(given, code, param):
    error = refusal_of({**HELLO, **given}, proxy.CHAT)
    assert (error.code, error.param) == (code, param)


@table(
    "given, code, param",
    [
        ("no prompts", {"prompt": []}, "empty_array", "prompt"),
        ("token ids", {"prompt": [1, 2]}, "invalid_type", "prompt[0]"),
        ("prompts", {"prompt": ["a"] * 129}, "array_above_max_length", "prompt"),
        ("to fill in", {"suffix": "."}, UNSUPPORTED, "suffix"),
        ("logprobs", {"logprobs": 0}, UNSUPPORTED, "logprobs"),
        ("the best of two", {"best_of": 2}, UNSUPPORTED, "best_of"),
        ("no boolean", {"echo": 1}, "invalid_type", "echo"),
        ("effort", {"reasoning_effort": "x"}, "invalid_value", "reasoning_effort"),
    ],
)
def test_check_refuses_for_completions(given, code, param):
    error = refusal_of(given, proxy.COMPLETION)
    assert (error.code, error.param) == (code, param)


REFUSED = {
    "missing_required_parameter": (
        {"messages": [{"role": "user"}]},
        "Missing required parameter: 'messages[0].content'.",
    ),
    "invalid_type": (
        {"messages": [{"role": "user", "content": 5}]},
        "Invalid type for 'messages[0].content': expected one of a string or an array, "
        "but got an integer instead.",
    ),
    "invalid_value": (
        {"verbosity": "loud"},
        "Invalid value: 'loud'. Supported values are: 'low', 'medium', and 'high'.",
    ),
    "decimal_above_max_value": (
        {"temperature": 200},
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 2, but"
        " got 200 instead.",
    ),
    "decimal_below_min_value": (
        {"presence_penalty": -2.1},
        "Invalid 'presence_penalty': decimal below minimum value. Expected a value >= "
        "-2, but got -2.1 instead.",
    ),
    "integer_above_max_value": (
        {"seed": 2**63},
        "Invalid 'seed': integer above maximum value. Expected a value <= "
        "9223372036854775807, but got 9223372036854775808 instead.",
    ),
    "integer_below_min_value": (
        {"max_tokens": 0},
        "Invalid 'max_tokens': integer below minimum value. Expected a value >= 1, but "
        "got 0 instead.",
    ),
    "array_above_max_length": (
        {"stop": ["a"] * 65},
        "Invalid 'stop': array too long. Expected an array with maximum length 64, but "
        "got 65 instead.",
    ),
    "empty_array": (
        {"messages": []},
        "Invalid 'messages': empty array. Expected an array with minimum length 1.",
    ),
    "unsupported_parameter": (
        {"audio": {"voice": "ash"}},
        "Unsupported parameter: 'audio' is not supported here. Replicate's language "
        "models answer in text.",
    ),
}


@pytest.mark.parametrize("code", REFUSED)
def test_each_refusal_says_what_is_wrong_in_openais_words(code):
    given, message = REFUSED[code]
    error = refusal_of({**HELLO, **given}, proxy.CHAT)
    assert (error.code, str(error)) == (code, message)


@pytest.mark.parametrize(
    "given",
    [
        {"n": 1},
        {"logit_bias": {}},
        {"logprobs": False},
        {"top_logprobs": 0},
        {"tools": []},
        {"tools": [], "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"functions": [], "function_call": "auto"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"stop": ["a"] * 64},
        {"seed": -(2**63)},
        {"max_tokens": 10**400},
        {"messages": [{"role": "user", "content": "", "tool_calls": []}]},
    ],
    ids=str,
)
def test_what_asks_for_nothing_special_is_accepted(given):
    proxy.check({**HELLO, **given}, proxy.CHAT)


@pytest.mark.parametrize("given", [{"suffix": ""}, {"best_of": 1}, {"n": 1}], ids=str)
def test_what_asks_for_nothing_special_is_accepted_for_completions(given):
    proxy.check(given, proxy.COMPLETION)


def test_null_is_the_same_as_absent():
    nulls = {name: None for name in [*proxy.CHAT, *proxy.IGNORED, "min_p"]}
    assert proxy.check({**nulls, **HELLO}, proxy.CHAT) == proxy.check(HELLO, proxy.CHAT)


def test_check_fills_in_every_parameter():
    body = proxy.check({"prompt": "Once"}, proxy.COMPLETION)
    assert {name: value for name, value in body.items() if value is not None} == {
        "stream": False,
        "stream_options": {},
        "stop": [],
        "prompt": ["Once"],
        "max_tokens": 16,
        "echo": False,
    }


@table(
    "given, expected",
    [
        ("one", "END", ["END"]),
        ("several", ["END", "\n"], ["END", "\n"]),
        ("none", None, []),
    ],
)
def test_one_string_stands_for_an_array_of_one(given, expected):
    assert proxy.check({**HELLO, "stop": given}, proxy.CHAT)["stop"] == expected


def test_what_openai_does_not_document_is_no_error():
    proxy.check({**HELLO, "min_p": 0.1, "chat_template_kwargs": {}}, proxy.CHAT)


NOT_OPENAIS = {"top_k", "min_tokens", "repetition_penalty"}
SHARED = """ model stream stream_options temperature top_p presence_penalty
frequency_penalty max_tokens stop seed n logit_bias logprobs user"""
DOCUMENTED = {
    "CHAT": """messages max_completion_tokens reasoning_effort verbosity top_logprobs
    tools tool_choice parallel_tool_calls functions function_call response_format
    modalities audio prediction web_search_options service_tier store metadata
    safety_identifier prompt_cache_key prompt_cache_retention prompt_cache_options
    moderation"""
    + SHARED,
    "COMPLETION": "prompt suffix echo best_of" + SHARED,
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_documented_parameter_is_in_exactly_one_place(name):
    rows = getattr(proxy, name).keys()
    documented = set(DOCUMENTED[name].split())
    assert not rows & proxy.IGNORED
    assert not documented - rows - proxy.IGNORED


def test_nothing_else_is_in_the_tables():
    documented = {*" ".join(DOCUMENTED.values()).split()}
    known = {*proxy.CHAT, *proxy.COMPLETION, *proxy.IGNORED}
    assert known == documented | NOT_OPENAIS


# == Families ==================================================================

MODELS_OF = {
    "llama-2": "meta/llama-2-7b-chat meta/llama-2-13b-chat meta/llama-2-70b-chat",
    "llama-3": """meta/meta-llama-3-8b-instruct meta/meta-llama-3-70b-instruct
    meta/meta-llama-3.1-405b-instruct""",
    "llama-4": "meta/llama-4-scout-instruct meta/llama-4-maverick-instruct",
    "gpt-5-structured": "openai/gpt-5-structured",
    "o1-mini": "openai/o1-mini",
    "o-series": "openai/o1 openai/o4-mini",
    "gpt-5-pro": "openai/gpt-5-pro",
    "gpt-5.1": "openai/gpt-5.1",
    "gpt-5.2": "openai/gpt-5.2 openai/gpt-5.4",
    "gpt-5": "openai/gpt-5 openai/gpt-5-mini openai/gpt-5-nano",
    "open": """deepseek-ai/deepseek-r1 deepseek-ai/deepseek-v3 deepseek-ai/deepseek-v3.1
    openai/gpt-oss-20b openai/gpt-oss-120b xai/grok-4 moonshotai/kimi-k2-thinking
    moonshotai/kimi-k2.5 qwen/qwen3-235b-a22b-instruct-2507""",
    "gpt-4": """openai/gpt-4o openai/gpt-4o-mini openai/gpt-4.1 openai/gpt-4.1-mini
    openai/gpt-4.1-nano""",
    "claude-3.5": "anthropic/claude-3.5-haiku anthropic/claude-4.5-haiku",
    "claude": """anthropic/claude-3.7-sonnet anthropic/claude-4-sonnet
    anthropic/claude-4.5-sonnet anthropic/claude-opus-4.6""",
    "gemini-3.1": "google/gemini-3.1-pro",
    "gemini-3": "google/gemini-3-pro google/gemini-3-flash",
    "gemini": "google/gemini-2.5-flash",
    "granite": """ibm-granite/granite-3.0-8b-instruct
    ibm-granite/granite-3.1-8b-instruct ibm-granite/granite-3.2-8b-instruct""",
    "granite-messages": """ibm-granite/granite-3.3-8b-instruct
    ibm-granite/granite-4.0-h-small""",
    "mistral": "mistralai/mistral-7b-v0.1",
}


def family_of(ref, **config):
    family = proxy.find_family(proxy.Model("", ref, proxy.ModelConfig(**config)))
    names = [name for name, row in proxy.FAMILIES.items() if row is family]
    return names[0] if names else None


@pytest.mark.parametrize("family", proxy.FAMILIES)
def test_each_model_is_of_the_family_that_fits(family):
    for ref in MODELS_OF[family].split():
        assert (ref, family_of(ref)) == (ref, family)


@table(
    "ref, expected",
    [
        ("a version of a model", f"meta/llama-2-7b-chat:{VERSION}", "llama-2"),
        ("a version alone", VERSION, None),
        ("somebody's model", "me/llama-2-7b-chat", None),
        ("a base model", "meta/llama-2-7b", None),
        ("a name that goes on", "meta/llama-2-7b-chat-hf", None),
    ],
)
def test_a_family_is_found_by_owner_and_name(ref, expected):
    assert family_of(ref) == expected


def test_models_json_has_the_first_word_on_a_family():
    assert family_of("me/mine", family="claude") == "claude"
    assert family_of("meta/llama-2-7b-chat", family="claude") == "claude"


def test_every_parameter_that_a_family_takes_is_checked():
    taken = {name for family in proxy.FAMILIES.values() for name in family.fields}
    assert taken <= proxy.CHAT.keys()
    assert taken <= proxy.COMPLETION.keys()


SYSTEM = {"role": "system", "content": "Be brief."}
DEVELOPER = {"role": "developer", "content": "Be kind."}
QUESTION = {"role": "user", "content": "Hi"}
START = {"role": "assistant", "content": "Hel"}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}],
}
BEGIN = "<|begin_of_text|>"


@table(
    "family, messages, expected",
    [
        ("a question", "claude", [QUESTION], {"prompt": "Hi"}),
        ("parts are joined", "claude", [PARTS], {"prompt": "Hi"}),
        (
            "a question and a system field",
            "claude",
            [SYSTEM, QUESTION],
            {"system_prompt": "Be brief.", "prompt": "Hi"},
        ),
        (
            "a question and no system field",
            "open",
            [SYSTEM, QUESTION],
            {"prompt": "Be brief.\n\nHi"},
        ),
        ("a lone instruction", "claude", [SYSTEM], {"prompt": "Be brief."}),
        (
            "instructions anywhere",
            "gemini",
            [SYSTEM, QUESTION, DEVELOPER],
            {"system_instruction": "Be brief.\n\nBe kind.", "prompt": "Hi"},
        ),
        (
            "a beginning of the answer",
            "open",
            [QUESTION, START],
            {"prompt": "User: Hi\n\nAssistant: Hel"},
        ),
        ("an answer alone", "open", [START], {"prompt": "Assistant: Hel"}),
        (
            "two questions in a row",
            "open",
            [QUESTION, QUESTION],
            {"prompt": "User: Hi\n\nUser: Hi\n\nAssistant:"},
        ),
        ("llama 2: a question", "llama-2", [QUESTION], {"prompt": "Hi"}),
        (
            "llama 2: a beginning of the answer",
            "llama-2",
            [QUESTION, START],
            {"prompt": "[INST] Hi [/INST]\nHel"},
        ),
        (
            "llama 3: a question",
            "llama-3",
            [QUESTION],
            {
                "prompt": f"{BEGIN}<|start_header_id|>user<|end_header_id|>\n\nHi"
                "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                "prompt_template": "{prompt}",
            },
        ),
        (
            "llama 4: a beginning of the answer",
            "llama-4",
            [QUESTION, START],
            {
                "prompt": f"{BEGIN}<|header_start|>user<|header_end|>\n\nHi<|eot|>"
                "<|header_start|>assistant<|header_end|>\n\nHel",
                "prompt_template": "{prompt}",
            },
        ),
        (
            "messages: developer",
            "gpt-4",
            [DEVELOPER, PARTS, START],
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hel"},
                ]
            },
        ),
        (
            "messages: a model without instructions",
            "o1-mini",
            [SYSTEM, QUESTION],
            {
                "messages": [
                    {"role": "user", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                ]
            },
        ),
        (
            "items: a question",
            "gpt-5-structured",
            [QUESTION],
            {"input_item_list": [{"role": "user", "content": "Hi"}]},
        ),
    ],
)
def test_messages_are_laid_out_as_the_family_wants_them(family, messages, expected):
    row = proxy.FAMILIES[family]
    assert row.lay_out(messages, row.system) == expected


# == Inputs ====================================================================


def chat_order(ref, given, **config):
    model = proxy.Model("", ref, proxy.ModelConfig(**config))
    return proxy.chat_order(proxy.check({**HELLO, **given}, proxy.CHAT), model)


def chat_input(ref, **given):
    return chat_order(ref, given).input


EVERYTHING = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ],
    "temperature": 0,
    "top_p": 0.9,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "max_tokens": 100,
    "stop": ["END", "a,b"],
    "seed": 7,
    "top_k": 40,
    "min_tokens": 2,
    "repetition_penalty": 1.1,
    "reasoning_effort": "max",
    "verbosity": "low",
    "user": "me",
    "min_p": 0.1,
}

TALK = EVERYTHING["messages"]
TRANSCRIPT = "User: Hi\n\nAssistant: Hello!\n\nUser: Bye\n\nAssistant:"
BY_PROMPT = {"prompt": TRANSCRIPT}
BY_LONG_PROMPT = {"prompt": f"Be brief.\n\n{TRANSCRIPT}"}
BY_MESSAGES = {"messages": TALK, "max_completion_tokens": 100}
GEMINI = {
    "system_instruction": "Be brief.",
    **BY_PROMPT,
    "temperature": 0,
    "top_p": 0.9,
    "max_output_tokens": 100,
}
OPEN = {
    "temperature": 0,
    "top_p": 0.9,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
}
LLAMA = {
    **OPEN,
    "top_k": 40,
    "min_tokens": 2,
    "max_tokens": 100,
    "stop_sequences": "END",
}
LLAMA_2 = {
    "temperature": 0.01,
    "top_p": 0.9,
    "top_k": 40,
    "seed": 7,
    "repetition_penalty": 1.1,
    "min_new_tokens": 2,
    "max_new_tokens": 100,
    "stop_sequences": "END",
}

INPUTS = {
    "llama-2": {
        "system_prompt": "Be brief.",
        "prompt": "[INST] Hi [/INST]\nHello!\n[INST] Bye [/INST]",
        **LLAMA_2,
    },
    "llama-3": {
        "prompt": "<|begin_of_text|>"
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "prompt_template": "{prompt}",
        **LLAMA,
    },
    "llama-4": {
        "prompt": "<|begin_of_text|>"
        "<|header_start|>system<|header_end|>\n\nBe brief.<|eot|>"
        "<|header_start|>user<|header_end|>\n\nHi<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\nHello!<|eot|>"
        "<|header_start|>user<|header_end|>\n\nBye<|eot|>"
        "<|header_start|>assistant<|header_end|>\n\n",
        "prompt_template": "{prompt}",
        **LLAMA,
    },
    "gpt-5-structured": {
        "instructions": "Be brief.",
        "input_item_list": TALK[1:],
        "max_output_tokens": 100,
        "reasoning_effort": "high",
        "verbosity": "low",
    },
    "o1-mini": {
        "messages": [{"role": "user", "content": "Be brief."}, *TALK[1:]],
        "max_completion_tokens": 100,
    },
    "o-series": {**BY_MESSAGES, "reasoning_effort": "high"},
    "gpt-5-pro": {**BY_MESSAGES, "verbosity": "low"},
    "gpt-5.1": {**BY_MESSAGES, "reasoning_effort": "high", "verbosity": "low"},
    "gpt-5.2": {**BY_MESSAGES, "reasoning_effort": "xhigh", "verbosity": "low"},
    "gpt-5": {**BY_MESSAGES, "reasoning_effort": "high", "verbosity": "low"},
    "open": {**BY_LONG_PROMPT, **OPEN, "max_tokens": 100},
    "gpt-4": {**BY_MESSAGES, **OPEN},
    "claude-3.5": {"system_prompt": "Be brief.", **BY_PROMPT, "max_tokens": 100},
    "claude": {"system_prompt": "Be brief.", **BY_PROMPT, "max_tokens": 1024},
    "gemini-3.1": {**GEMINI, "thinking_level": "high"},
    "gemini-3": {**GEMINI, "thinking_level": "high"},
    "gemini": GEMINI,
    "granite": {"system_prompt": "Be brief.", **BY_PROMPT, **LLAMA},
    "granite-messages": {
        **BY_MESSAGES,
        **OPEN,
        "top_k": 40,
        "min_tokens": 2,
        "seed": 7,
        "stop": ["END", "a,b"],
    },
    "mistral": {**BY_LONG_PROMPT, **LLAMA_2},
}


@pytest.mark.parametrize("family", proxy.FAMILIES)
def test_each_family_is_asked_in_its_own_words(family):
    for ref in MODELS_OF[family].split():
        assert chat_input(ref, **EVERYTHING) == INPUTS[family]


def test_a_model_of_no_family_is_given_the_transcript_alone():
    assert chat_input("me/mine", **EVERYTHING) == BY_LONG_PROMPT


@table(
    "ref, expected",
    [
        (
            "a short default is made longer",
            "meta/llama-2-7b-chat",
            {"prompt": "Hello", "max_new_tokens": 4096},
        ),
        ("a long one is left alone", "google/gemini-2.5-flash", {"prompt": "Hello"}),
        ("effort is left to the model", "openai/gpt-5", HELLO),
    ],
)
def test_what_nobody_asked_for_is_not_sent(ref, expected):
    assert chat_input(ref) == expected


NEWER, EFFORT = "max_completion_tokens", "reasoning_effort"
GRANITE, SOME_STOPS = "granite-messages", ["a", "b,c", "", "d"]


def changes(family, given):
    """What a call's input has that it had not without these parameters."""
    ref = MODELS_OF[family].split()[0]
    plain = chat_input(ref)
    return {k: v for k, v in chat_input(ref, **given).items() if plain.get(k) != v}


@table(
    "family, given, expected",
    [
        ("0 is illegal", "llama-2", {"temperature": 0}, {"temperature": 0.01}),
        ("0 is legal", "gpt-4", {"temperature": 0.0}, {"temperature": 0.0}),
        ("too many", "claude-3.5", {"max_tokens": 100_000}, {"max_tokens": 8192}),
        ("too few", "claude", {"max_tokens": 16}, {"max_tokens": 1024}),
        ("the newer name", "gpt-5", {NEWER: 7, "max_tokens": 5}, {NEWER: 7}),
        ("one to stop at", "llama-2", {"stop": "END"}, {"stop_sequences": "END"}),
        ("no commas", "llama-2", {"stop": SOME_STOPS}, {"stop_sequences": "a,d"}),
        ("a list", GRANITE, {"stop": SOME_STOPS}, {"stop": ["a", "b,c", "d"]}),
        ("no stop string", GRANITE, {"stop": [""]}, {}),
        ("no legal stop string", "llama-2", {"stop": ","}, {}),
        ("below the least", "o-series", {EFFORT: "none"}, {EFFORT: "low"}),
        ("above the most", "gpt-5", {EFFORT: "xhigh"}, {EFFORT: "high"}),
        ("known", "gpt-5.2", {EFFORT: "xhigh"}, {EFFORT: "xhigh"}),
        ("in between", "gemini-3", {EFFORT: "medium"}, {"thinking_level": "low"}),
    ],
)
def test_a_value_is_brought_to_what_the_model_takes(family, given, expected):
    assert changes(family, given) == expected


RANGE = "temperature_range"


@table(
    "config, given, expected",
    [
        ("lowered", {"max_tokens": 50}, {"max_tokens": 99}, {"max_tokens": 50}),
        ("low already", {"max_tokens": 50}, {"max_tokens": 9}, {"max_tokens": 9}),
        ("not asked for", {"max_tokens": 50}, {}, {"max_tokens": 50}),
        ("too hot", {RANGE: [0.1, 1]}, {"temperature": 2}, {"temperature": 1}),
        ("too cold", {RANGE: [0.1, 1]}, {"temperature": 0}, {"temperature": 0.1}),
        ("neither", {RANGE: [0.1, 1]}, {}, {}),
        ("always sent", {"input": {"thinking": "None"}}, {}, {"thinking": "None"}),
        ("last", {"input": {"max_tokens": 9}}, {"max_tokens": 99}, {"max_tokens": 9}),
    ],
)
def test_models_json_has_its_say(config, given, expected):
    sent = chat_order("deepseek-ai/deepseek-v3.1", given, **config).input
    assert sent == {"prompt": "Hello", "max_tokens": 4096, **expected}


@table(
    "ref, given, limit, cut",
    [
        ("as asked", "openai/gpt-4o", {"max_tokens": 16}, 16, None),
        ("by default", "meta/llama-2-7b-chat", {}, 4096, None),
        ("none", "openai/gpt-4o", {}, None, None),
        ("none to send", "me/mine", {"max_tokens": 16}, None, None),
        ("too low", "anthropic/claude-4-sonnet", {"max_tokens": 16}, 1024, 16),
        ("too high", "anthropic/claude-3.5-haiku", {"max_tokens": 9999}, 8192, None),
    ],
)
def test_an_order_knows_its_limit_and_where_the_proxy_must_cut(ref, given, limit, cut):
    order = chat_order(ref, given)
    assert (order.limit, order.cut) == (limit, cut)


def test_an_order_knows_openais_names_of_its_inputs():
    names = chat_order("meta/llama-2-7b-chat", {}).names
    assert names["max_new_tokens"] == "max_tokens"
    assert names["stop_sequences"] == "stop"


def test_an_order_knows_all_that_was_said():
    order = chat_order("openai/gpt-4o", {"messages": EVERYTHING["messages"]})
    assert order.prompt == "Be brief.\nHi\nHello!\nBye"


@table(
    "ref, expected",
    [
        ("a plain prompt", "openai/gpt-4o", {"max_completion_tokens": 16}),
        (
            "a prompt with a template",
            "meta/meta-llama-3-8b-instruct",
            {"prompt_template": "{prompt}", "max_tokens": 16},
        ),
        ("a model of no family", "me/mine", {}),
    ],
)
def test_a_prompt_is_sent_as_it_is(ref, expected):
    body = proxy.check({"prompt": "Once upon"}, proxy.COMPLETION)
    order = proxy.completion_order(body, proxy.Model("", ref), "Once upon")
    assert order.input == {"prompt": "Once upon", **expected}
    assert order.prompt == "Once upon"


# == Events ====================================================================

STARTED = proxy.Started("p1", "meta/llama-2-7b-chat")
COUNTED = proxy.Done("stop", proxy.Usage(5, 7))


def play(*texts, end=COUNTED):
    yield STARTED
    yield from map(proxy.Text, texts)
    if isinstance(end, Exception):
        raise end
    yield end


def heard(events):
    """What a client hears in the end: all text, and why it ended."""
    *told, done = events
    texts = [event.text for event in told if isinstance(event, proxy.Text)]
    return "".join(texts), done.finish_reason


def cut(whole, places):
    """Cut a text, or bytes, at these places, wherever they fall."""
    edges = sorted({0, len(whole), *(place % (len(whole) + 1) for place in places)})
    return [whole[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def stopped(text, stops):
    """As slowly and plainly as it can be said: the oracle for stop_at."""
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stops if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)], "stop"
    return text, "length"


@thoroughly
@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 30)),
)
def test_a_stop_string_ends_the_answer_however_it_is_cut_up(text, stops, places):
    events = play(*cut(text, places), end=proxy.Done("length"))
    assert heard(proxy.stop_at(events, stops)) == stopped(text, stops)


def test_nothing_follows_a_stop_string_but_the_end():
    events = list(proxy.stop_at(play("1, 2", ", 3. 4", "5"), [". ", ", 3"]))
    assert events == [STARTED, proxy.Text("1, 2"), proxy.Done("stop")]


def test_text_is_held_back_only_while_it_may_begin_a_stop_string():
    assert list(proxy.stop_at(play("a E", "N", "T E"), ["END"])) == [
        STARTED,
        proxy.Text("a "),
        proxy.Text("ENT "),
        proxy.Text("E"),
        COUNTED,
    ]


@table(
    "text, stops, expected",
    [
        ("no stop strings", "abc", [], 0),
        ("no beginning of one", "abc", ["d"], 0),
        ("a beginning", "abc", ["bcd", "x"], 2),
        ("the longest beginning", "abab", ["abc", "ababc"], 4),
        ("a whole one is no overhang", "abc", ["abc"], 0),
    ],
)
def test_overhang_is_what_may_begin_a_stop_string(text, stops, expected):
    assert proxy.overhang(text, stops) == expected


@table(
    "texts, expected",
    [
        ("short enough", ["abcd", "efgh"], ("abcdefgh", "stop")),
        ("too long in one piece", ["abcdefghi"], ("abcdefgh", "length")),
        ("too long in the end", ["abcdefgh", "i", "j"], ("abcdefgh", "length")),
    ],
)
def test_an_answer_is_cut_after_so_many_tokens_of_four_characters(texts, expected):
    assert heard(proxy.cut_after(play(*texts), 2)) == expected


def test_echo_says_the_prompt_first():
    assert list(proxy.echo(play("b"), "a")) == [
        STARTED,
        proxy.Text("a"),
        proxy.Text("b"),
        COUNTED,
    ]


@table(
    "counted, expected",
    [
        ("true counts stay", (5, 7), (5, 7)),
        ("0 is a count", (0, 0, 3), (0, 0, 3)),
        ("no counts", (), (2, 3, 0, True)),
        ("one count", (None, 7), (2, 7, 0, True)),
        ("the other", (5, None), (5, 3, 0, True)),
    ],
)
def test_usage_is_completed_by_estimate(counted, expected):
    end = proxy.Done("stop", proxy.Usage(*counted))
    *_, done = proxy.account(play("abcdef", "ghi", end=end), "prompt", None)
    assert done == proxy.Done("stop", proxy.Usage(*expected))


@table(
    "limit, counted, expected",
    [
        ("no limit", None, (5, 7), "stop"),
        ("reached", 7, (5, 7), "length"),
        ("not reached", 8, (5, 7), "stop"),
        ("reached by estimate", 3, (), "stop"),
    ],
)
def test_only_a_true_count_reaches_a_limit(limit, counted, expected):
    end = proxy.Done("stop", proxy.Usage(*counted))
    events = proxy.account(play("abcdef", "ghi", end=end), "prompt", limit)
    assert heard(events) == ("abcdefghi", expected)


SHAPES = {
    "stop_at": lambda events: proxy.stop_at(events, ["END"]),
    "cut_after": lambda events: proxy.cut_after(events, 1),
    "echo": lambda events: proxy.echo(events, "prompt"),
    "account": lambda events: proxy.account(events, "prompt", None),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_events_that_are_left_early_are_closed(shape):
    events = play("a", "b")  # held here, or counting references would close them
    shaped = shape(events)
    assert next(shaped) == STARTED
    shaped.close()
    assert inspect.getgeneratorstate(events) == inspect.GEN_CLOSED


@pytest.mark.parametrize("name", ["stop_at", "cut_after"])
def test_an_answer_that_is_cut_short_closes_its_events(name):
    events = play("a END", "b")
    assert heard(SHAPES[name](events))[0] in ("a ", "a EN")
    assert inspect.getgeneratorstate(events) == inspect.GEN_CLOSED


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_failure_passes_through(shape):
    with pytest.raises(proxy.APIError, match="No"):
        list(shape(play("a", end=proxy.APIError(502, "No"))))


# == Streams ===================================================================


@table(
    "wire, expected",
    [
        (
            "as Replicate sends it",
            b"event: output\nid: 1690212292:0\ndata: Once\n\n"
            b"event: output\nid: 1690212293:0\ndata:  upon\n\n"
            b"event: done\ndata: {}\n\n",
            [("output", "Once"), ("output", " upon"), ("done", "{}")],
        ),
        ("a line end", b"event: output\ndata:\ndata:\n\n", [("output", "\n")]),
        ("no space", b"event:output\ndata:a\n\n", [("output", "a")]),
        ("one space is taken", b"data:   a\n\n", [("", "  a")]),
        ("no colon", b"event: output\ndata\n\n", [("output", "")]),
        ("no event", b"data: a\n\n", [("", "a")]),
        ("no data", b"event: done\n\n", [("done", "")]),
        (
            "an event's name ends with it",
            b"event: a\n\ndata: b\n\n",
            [("a", ""), ("", "b")],
        ),
        ("comments", b": hi\n\n:\n\ndata: a\n: b\n\n", [("", "a")]),
        ("unknown fields", b"retry: 5\nfoo\nmetadata: b\ndata: a\n\n", [("", "a")]),
        ("more empty lines", b"\n\ndata: a\n\n\n\n", [("", "a")]),
        ("an unfinished event", b"data: a\n\nevent: output\ndata: b\n", [("", "a")]),
        ("an unfinished line", b"data: a\n\ndata: b", [("", "a")]),
        (
            "a time-out",
            b"data: a\n\n:408: 408 Request Timeout\n\ndata: b\n\n",
            [("", "a")],
        ),
        ("a time-out that is text", b"data: :408\n\n", [("", ":408")]),
        (
            "mixed line ends",
            b"data: a\r\rdata: b\r\n\ndata: c\n\r\n",
            [("", "a"), ("", "b"), ("", "c")],
        ),
        ("what is not UTF-8", b"data: \xff\n\n", [("", "\ufffd")]),
    ],
)
def test_a_stream_is_decoded_whole_and_byte_by_byte(wire, expected):
    assert list(proxy.server_sent([wire])) == expected
    assert list(proxy.server_sent([bytes([byte]) for byte in wire])) == expected


def encoded(texts, line_end):
    """Texts as Replicate sends them."""
    lines = []
    for text in texts:
        data = [f"data: {line}" for line in text.split("\n")]
        lines += ["event: output", "id: 1690212292:0", *data, ""]
    return "".join(line + line_end for line in lines).encode()


TOKENS = st.sampled_from(
    ["", " ", "\n", "\n\n", " a", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"]
    + ["https://a.b", "https:", "data:", "data: a", "event: done", ":408", "{}", "🙂"]
)
ANY_TEXT = st.text(st.characters(exclude_characters="\r", exclude_categories=["Cs"]))


@thoroughly
@given(
    st.lists(TOKENS | ANY_TEXT, max_size=6),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(0, 1000)),
)
def test_text_comes_out_of_a_stream_as_it_went_in(texts, line_end, places):
    pieces = cut(encoded(texts, line_end), places)
    events = list(proxy.server_sent(pieces))
    assert events == [("output", text) for text in texts]


def test_an_event_is_told_as_soon_as_its_bytes_are_here():
    def pieces():
        yield b"data: a\n\ndata: b\n"
        raise AssertionError("more was read than the first event needs")

    assert next(proxy.server_sent(pieces())) == ("", "a")


# == The file ==================================================================

BANNER = re.compile(r"^# == ([\w ]+) =+$", re.MULTILINE)
STARTS = [SOURCE[: match.start()].count("\n") + 1 for match in BANNER.finditer(SOURCE)]
TREE = ast.parse(SOURCE)
FUNCTIONS = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]


def section(node):
    """The number of the section a node stands in; 0 is above the first banner."""
    return sum(start <= node.lineno for start in STARTS)


def names_in(node, context):
    """The names that are read in a node (ast.Load), or bound (ast.Store)."""
    names = [name for name in ast.walk(node) if isinstance(name, ast.Name)]
    return [name for name in names if isinstance(name.ctx, context)]


def names_made(node):
    arguments = {name.arg for name in ast.walk(node) if isinstance(name, ast.arg)}
    return arguments | {name.id for name in names_in(node, ast.Store)}


def test_the_map_in_the_docstring_names_the_sections():
    _, listed = proxy.__doc__.split("uses only names from those above it.\n")
    assert re.findall(r"^    (\w+)  ", listed, re.MULTILINE) == BANNER.findall(SOURCE)


def test_banners_reach_to_column_80_and_nothing_else_looks_like_one():
    lines = re.findall(r"^#.*={4}.*$", SOURCE, re.MULTILINE)
    assert [len(line) for line in lines] == [80] * len(lines)
    assert len(lines) == len(BANNER.findall(SOURCE))


def test_sections_use_only_names_above_them():
    home = {}
    for node in TREE.body:
        own = {node.name} if hasattr(node, "name") else names_made(node)
        home |= dict.fromkeys(own, section(node))
    assert len(home) > 200
    below = []
    for node in TREE.body:
        local = names_made(node)
        used = [name for name in names_in(node, ast.Load) if name.id not in local]
        below += [name for name in used if home.get(name.id, 0) > section(node)]
    assert not [f"line {name.lineno}: {name.id}" for name in below]


def test_no_section_is_long():
    parts = BANNER.split(SOURCE)
    lengths = {
        name: text.count("\n")
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    assert not {name: length for name, length in lengths.items() if length > 300}


def test_functions_are_short():
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in FUNCTIONS}
    assert not {name: length for name, length in lengths.items() if length > 25}
    each = [node.end_lineno - node.lineno + 1 for node in FUNCTIONS]
    assert statistics.median(each) <= 8


def test_env_example_names_the_settings():
    text = (HERE / ".env.example").read_text(encoding="utf-8")
    named = re.findall(r"^#? ?([A-Z_]+)=", text, re.MULTILINE)
    assert sorted(named) == sorted(row.name.upper() for row in fields(proxy.Settings))


def test_env_example_has_to_be_filled_in():
    text = (HERE / ".env.example").read_text(encoding="utf-8")
    settings = proxy.Settings.from_environ(proxy.read_env_file(text))
    with pytest.raises(proxy.ConfigError) as caught:
        settings.check()
    assert caught.value.problems == NEITHER_SECRET_IS_REAL


def test_env_example_gives_the_defaults():
    text = (HERE / ".env.example").read_text(encoding="utf-8")
    given = proxy.read_env_file(re.sub(r"^# ?(?=[A-Z_]+=)", "", text, flags=re.M))
    wanted = {row.name.upper(): str(row.default) for row in fields(proxy.Settings)}
    differing = {name for name in given if given[name] not in ("", wanted[name])}
    assert differing <= {"REPLICATE_API_TOKEN", "PROXY_API_KEY", "MODELS_PATH"}


def test_the_requirements_are_the_same_in_both_files():
    required = (HERE / "requirements.txt").read_text(encoding="utf-8").split()
    inline = re.search(r"^# dependencies = (.*)$", SOURCE, re.MULTILINE)
    assert json.loads(inline[1]) == required


IMPORT = """
import logging, os, signal, threading

def state():
    handlers = [logging.getLogger(name).handlers[:] for name in ("", "proxy")]
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return dict(os.environ), os.getcwd(), threading.enumerate(), handlers, signals

before = state()
import proxy
assert state() == before
"""


def test_an_import_starts_nothing_and_changes_nothing():
    command = [sys.executable, "-B", "-c", IMPORT]
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("endpoint", proxy.ENDPOINTS, ids=lambda row: row.path)
def test_the_readme_names_every_endpoint(endpoint):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    path = re.escape(endpoint.path.partition("*")[0])
    assert re.search(rf"[`\s](/v1)?{path}", readme)


@pytest.mark.parametrize("family", proxy.FAMILIES)
def test_the_readme_names_every_family(family):
    assert f"`{family}`" in (HERE / "README.md").read_text(encoding="utf-8")

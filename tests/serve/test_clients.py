"""Clients as people use them, unchanged, against the real server: OpenAI's, LangChain's three, and the pages' examples.

Anthropic's client is in `test_messages.py`, OpenAI's on Responses in `test_responses.py`.
"""

import re
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, SecretStr

QUESTION: Any = [{"role": "user", "content": "What is 1 + 2?"}]
OFF = {"thinking": {"type": "disabled"}}
SHORT = "temperature=0, max_output_tokens=60, input="
DOCS = Path(__file__).parents[2] / "docs"


class Sum(BaseModel):
    """What it comes to."""

    total: Literal[1, 2, 3]


def add(a: Literal[1, 2]) -> int:
    """Add one."""
    return a + 1


def test_openais_client_makes_records_of_chat_completions_and_responses(server: Any) -> None:
    client: openai.OpenAI = server.client
    options: Any = {"model": "babbler", "temperature": 0}
    chat = client.chat.completions.parse(
        **options, messages=QUESTION, response_format=Sum, max_completion_tokens=200, extra_body=OFF
    )
    assert isinstance(chat.choices[0].message.parsed, Sum)
    found = client.responses.parse(
        **options, input="1 + 2?", text_format=Sum, max_output_tokens=200, reasoning={"effort": "none"}
    )
    assert isinstance(found.output_parsed, Sum)
    with client.chat.completions.stream(
        **options, messages=QUESTION, response_format=Sum, max_completion_tokens=200, extra_body=OFF
    ) as stream:
        assert "content.delta" in {event.type for event in stream}
        assert stream.get_final_completion().choices[0].message.parsed == chat.choices[0].message.parsed


def test_openais_client_sees_typed_errors(server: Any) -> None:
    client: openai.OpenAI = server.client
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="gpt-9", input="x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-wrong").models.list()
    with pytest.raises(openai.InternalServerError) as refused:
        client.with_options(max_retries=2).embeddings.create(model="babbler", input="x")
    assert refused.value.status_code == 501 and refused.value.type == "not_implemented_error"
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert next(model.id for model in client.models.list()) == client.models.retrieve("babbler").id == "babbler"
    assert client.completions.create(model="babbler", prompt="What", max_tokens=3).usage.prompt_tokens > 1


def chat_models(server: Any) -> dict[str, Any]:
    from langchain_anthropic import ChatAnthropic
    from langchain_deepseek import ChatDeepSeek
    from langchain_openai import ChatOpenAI

    key, options = SecretStr(server.key), {"max_retries": 0, "temperature": 0}
    at = f"{server.url}/v1"
    return {
        "openai": ChatOpenAI(
            model="deepseek-chat",
            base_url=at,
            api_key=key,
            max_completion_tokens=200,
            use_responses_api=False,
            **options,
        ),
        "responses": ChatOpenAI(
            model="deepseek-chat",
            base_url=at,
            api_key=key,
            max_completion_tokens=200,
            use_responses_api=True,
            **options,
        ),
        "deepseek": ChatDeepSeek(model="deepseek-chat", api_base=at, api_key=key, max_tokens=200, **options),
        "anthropic": ChatAnthropic(
            model_name="deepseek-chat", base_url=server.url, api_key=key, max_tokens_to_sample=200, **options
        ),
    }  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["openai", "responses", "deepseek", "anthropic"])
def test_langchain(server: Any, name: str) -> None:
    model = chat_models(server)[name]
    whole = model.invoke("What is 1 + 2?")
    text = "".join(chunk.text for chunk in model.stream("What is 1 + 2?"))
    assert whole.text and text == whole.text
    assert whole.usage_metadata["output_tokens"] > 0
    called = model.bind_tools([add], tool_choice="any", parallel_tool_calls=False).invoke("What is 1 + 1?")
    (call,) = called.tool_calls
    assert call["name"] == "add" and call["args"]["a"] in (1, 2)
    if name != "anthropic":  # whose structured output is a call that may be left out
        assert isinstance(model.with_structured_output(Sum).invoke("What is 1 + 2?"), Sum)


def test_langchain_deepseek_reads_the_thought(server: Any) -> None:
    from langchain_deepseek import ChatDeepSeek

    model = ChatDeepSeek(
        model="deepseek-reasoner", api_base=f"{server.url}/v1", api_key=SecretStr(server.key), max_tokens=24,
        temperature=0,
    )  # fmt: skip
    thought = model.invoke("What is 1 + 2?").additional_kwargs["reasoning_content"]
    streamed = [chunk.additional_kwargs.get("reasoning_content", "") for chunk in model.stream("What is 1 + 2?")]
    assert thought and "".join(streamed) == thought


def test_the_examples_of_the_page_run(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        names: dict[str, Any] = {"client": server.client}
        code = code.replace("http://127.0.0.1:8000", server.url).replace("sk-...", server.key)
        code = code.replace("max_tokens=", 'extra_body={"temperature": 0}, max_tokens=')
        exec(
            code.replace('model="quickstart"', 'model="babbler"').replace("input=", SHORT),
            names,
        )
        if names["client"] is not server.client:
            names["client"].close()
        assert capsys.readouterr().out.strip()


def test_the_page_names_what_is_kept_as_the_shelf_has_it() -> None:
    from sputnik.serve.responses.shelf import BYTES, KEY_BYTES, PER_KEY, SECONDS

    page = (DOCS / "api.md").read_text(encoding="utf-8")
    kept = f"{PER_KEY} responses and {KEY_BYTES >> 20} MiB of each key, {BYTES >> 20} MiB of all"
    assert kept in page and SECONDS == 3600 and "for an hour" in page

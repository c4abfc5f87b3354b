"""Encode observations with a tokenizer's chat template: system message, earlier turns, request."""

from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from etpo.environments.text_env import Message, TextObservation
from etpo.errors import ConfigError, reason
from etpo.models.prompting import Prompt, PromptTemplate, Turn, check_room
from etpo.models.token_text import BROKEN, added_text, continued_ids, spelled_ids, text_ids

FAULTS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)  # of a template
MARK = "etpomark"  # stands for a text whose place in a rendered conversation is needed


class ChatTemplate(PromptTemplate):
    """Encode the observation's earlier turns and, as a user turn, its instruction.

    The ids are `tokenizer.apply_chat_template(..., tokenize=True, add_generation_prompt=True)`,
    except that `extend` keeps the sampled tokens of earlier turns. `encode` raises ConfigError for
    a tokenizer without a template, and for a template that does not render the messages.

    A prompt that is too long loses whole turns after the system message, the oldest first, then the
    oldest tokens of the instruction.

    Args:
        system: Text of a system message; None adds none. The system message of an observation
            follows in the same message.
        template_kwargs: Variables of the template, such as `enable_thinking`.
    """

    def __init__(
        self, system: str | None = None, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if system is not None and not isinstance(system, str):
            raise ConfigError(f"model.prompt.system={system}: allowed are a text and null")
        self.system = system
        self.template_kwargs = dict(template_kwargs or {})
        # template -> whether it reads a message as a list of parts, not as a text
        self._in_parts: dict[str, bool] = {}
        self._conversational: set[str] = set()  # templates that `check_conversations` has passed

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, observation: TextObservation, max_tokens: int
    ) -> Prompt:
        self._check(tokenizer)
        if "messages" in observation:
            self.check_conversations(tokenizer)
        turns = [*observation.get("messages", ()), user_turn(observation["instruction"])]
        messages = self._with_system(turns, self.system)
        ids = self._apply(tokenizer, messages, tokenize=True)
        size, first = len(ids), int(messages[0]["role"] == "system")
        while len(ids) > max_tokens and len(messages) > first + 1:
            later = (i for i, m in enumerate(messages) if i > first and m["role"] == "user")
            del messages[first : next(later)]
            ids = self._apply(tokenizer, messages, tokenize=True)
        if len(ids) > max_tokens:
            ids = self._cut_request(tokenizer, messages, ids, max_tokens)
        return Prompt(ids, size - len(ids))

    def _cut_request(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: list[Message],
        ids: list[int],
        max_tokens: int,
    ) -> list[int]:
        """Return the ids of `messages` with the last tokens of the last text that fit."""
        words = text_ids(tokenizer, messages[-1]["content"])
        kept = len(words)
        while len(ids) > max_tokens and kept > 1:
            kept = max(1, kept - (len(ids) - max_tokens))
            text = added_text(tokenizer, words[-kept:]).lstrip(BROKEN)
            ids = self._apply(tokenizer, [*messages[:-1], user_turn(text)], tokenize=True)
        check_room(max_tokens, len(ids) - kept)
        return ids

    def extend(
        self,
        tokenizer: PreTrainedTokenizerBase,
        observation: TextObservation,
        turn: Turn,
        stop_ids: Collection[int],
        max_tokens: int,
    ) -> Prompt | None:
        """Extend the prompt if `messages` are those of `turn`, its instruction and its action.

        The tokens between the action and the next one are rendered by the template after a mark in
        place of the action. A stop token that the template does not write is dropped, as are tokens
        of a stop string; an action without a stop token gets the template's.
        """
        asked = (
            *turn.observation.get("messages", ()),
            user_turn(turn.observation["instruction"]),
        )
        answered = (*asked, Message(role="assistant", content=turn.text))
        if tuple(observation.get("messages", ())) != answered:
            return None
        self.check_conversations(tokenizer)
        marked = [*asked, Message(role="assistant", content=MARK)]
        turns = [*marked, user_turn(observation["instruction"])]
        shown = self._apply(tokenizer, self._with_system(turns, self.system), tokenize=False)
        if shown.count(MARK) != 1:
            return None
        action, end = list(turn.action_ids), None
        if action and action[-1] in stop_ids:
            end = action.pop()
        kept, text = spelled_ids(tokenizer, action, turn.text)
        following = continued_ids(tokenizer, shown.partition(MARK)[2])
        if end in following:
            place = following.index(end)
            blank = not added_text(tokenizer, following[:place]).strip()
            following = following[place:] if blank else following
        missing = continued_ids(tokenizer, text) if text else []
        ids = [*turn.prompt_ids, *kept, *missing, *following]
        return Prompt(ids, 0) if len(ids) <= max_tokens else None

    def check_conversations(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ConfigError if the template rejects earlier turns or rewrites them.

        A prompt must begin with the prompt of an earlier turn. The generation prompt alone may
        differ from the beginning of the turn that it becomes, as in templates with thoughts.
        """
        self._check(tokenizer)
        if str(tokenizer.chat_template) in self._conversational:
            return
        marks = [f"{MARK}{letter}" for letter in "abcde"]
        roles = ("user", "assistant", "user", "assistant", "user")
        turns = [Message(role=r, content=m) for r, m in zip(roles, marks, strict=True)]
        system = None if self.system is None else f"{MARK}system"
        fault = "rewrites earlier turns"
        try:
            whole = self._render(tokenizer, self._with_system(turns, system))
            seen = [*marks, *([system] if system else [])]
            kept = all(whole.count(mark) == 1 for mark in seen)
            for answer in (1, 3):
                messages = self._with_system(turns[:answer], system)
                with_start = self._render(tokenizer, messages)
                without = self._render(tokenizer, messages, generation=False)
                pairs = zip(with_start, without, strict=False)
                asked = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                head = whole.partition(marks[answer])[0]
                before = {*seen} - {*marks[answer:]}
                kept = kept and head.startswith(asked) and all(mark in asked for mark in before)
            if kept:
                self._conversational.add(str(tokenizer.chat_template))
                return
        except FAULTS as error:
            fault = f"rejects earlier turns ({reason(error)})"
        raise ConfigError(
            f"model.prompt: the chat template of {tokenizer.name_or_path} {fault}"
            f"{'' if system is None else ' if there is a system message'}; allowed are "
            f"{'' if system is None else 'model.prompt.system=null, '}observations without earlier "
            "turns (environment.examples=0 environment.history=0) and model/prompt=completion"
        )

    def _check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise ConfigError unless the template renders a system message and one user turn."""
        if str(tokenizer.chat_template) in self._in_parts:
            return
        name, other = tokenizer.name_or_path, "choose a completion or infilling prompt"
        if tokenizer.chat_template is None:
            raise ConfigError(f"model.prompt: {name} has no chat template; {other}")
        lexed = Environment().lex(str(tokenizer.chat_template)) if self.template_kwargs else ()
        read = {value for _, kind, value in lexed if kind == "name"}
        for key, value in self.template_kwargs.items():
            if key not in read:
                raise ConfigError(
                    f"model.prompt.template_kwargs.{key}={value}: allowed are variables that the "
                    f"chat template of {name} reads"
                )
        in_parts, fault = self._reads(tokenizer, [user_turn(MARK)])
        if fault:
            raise ConfigError(
                f"model.prompt: the chat template of {name} cannot be used ({fault}); {other}"
            )
        messages = self._with_system([user_turn(MARK)], f"{MARK}system")
        if self.system is not None and (fault := self._reads(tokenizer, messages)[1]):
            raise ConfigError(
                f"model.prompt.system: the chat template of {name} rejects a system message "
                f"({fault}); allowed is null"
            )
        ids = self._render(tokenizer, [user_turn(MARK)], in_parts=in_parts, tokenize=True)
        bos = tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise ConfigError(
                f"model.prompt: the chat template of {name} begins a prompt with two BOS tokens; "
                f"allowed is a template that writes one, or {other}"
            )
        self._in_parts[str(tokenizer.chat_template)] = in_parts

    def _reads(
        self, tokenizer: PreTrainedTokenizerBase, messages: list[Message]
    ) -> tuple[bool, str]:
        """Return whether the template reads messages as lists of parts, and its fault or ""."""
        fault = f"it shows no text of the {messages[0]['role']}'s turn"
        for in_parts in (False, True):
            try:
                shown = self._render(tokenizer, messages, in_parts=in_parts)
                if all(message["content"] in shown.lower() for message in messages):
                    return in_parts, ""
            except FAULTS as error:
                fault = reason(error)
        return False, fault

    @staticmethod
    def _with_system(turns: Sequence[Message], system: str | None) -> list[Message]:
        """Return the turns with `system` as, or at the start of, their first message."""
        if system is None:
            return list(turns)
        if turns[0]["role"] == "system":
            system, turns = f"{system}\n\n{turns[0]['content']}", turns[1:]
        return [Message(role="system", content=system), *turns]

    def _apply(
        self, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, tokenize: bool
    ) -> Any:
        """Return `_render` of a prompt; raise ConfigError if the template rejects the messages."""
        try:
            return self._render(tokenizer, messages, tokenize=tokenize)
        except FAULTS as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ConfigError(
                f"model.prompt: the chat template of {tokenizer.name_or_path} rejects the roles "
                f"{roles} ({reason(error)}); allowed are observations with other messages, and "
                "model/prompt=completion"
            ) from error

    def _render(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        *,
        in_parts: bool | None = None,
        generation: bool = True,
        tokenize: bool = False,
    ) -> Any:
        """Return the text of the prompt or, with `tokenize`, its ids."""
        turns: list[Any] = list(messages)
        if self._in_parts[str(tokenizer.chat_template)] if in_parts is None else in_parts:
            turns = [
                {"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]}
                for turn in messages
            ]
        settings = self.template_kwargs | {"tokenize": tokenize, "return_dict": False}
        return tokenizer.apply_chat_template(turns, add_generation_prompt=generation, **settings)


def user_turn(text: str) -> Message:
    """Return a message of the user."""
    return Message(role="user", content=text)

"""What the sampler knows of one sequence beyond its tokens."""

from __future__ import annotations

import copy
from array import array

from trtforge.runtime.request import SamplingParams
from trtforge.runtime.sampling.constraints import BadWords, LogitBias, MinTokens, NoRepeatNGrams
from trtforge.runtime.sampling.grammar import GrammarMask, GrammarMatcher
from trtforge.runtime.sampling.penalties import Penalties
from trtforge.runtime.sampling.processor import History, LogitsProcessor


def needs_state(params: SamplingParams) -> bool:
    """Whether the sampler needs a SamplingState: False for greedy decoding with nothing else on."""
    return (
        params.temperature > 0
        or params.logprobs is not None
        or params.min_tokens > 0
        or params.no_repeat_ngram_size > 0
        or bool(params.logit_bias)
        or bool(params.bad_words_token_ids)
        or params.guided is not None
        or Penalties.wanted(params)
    )


class SamplingState:
    """The options of one sequence at work. `processors` change its logits, in their order.

    Follows the sequence's own `token_ids`, prompt then answer, to which drafts may be appended while they
    are scored; at `accept` they are gone.
    """

    def __init__(
        self,
        params: SamplingParams,
        token_ids: array[int],
        num_prompt_tokens: int,
        stop_token_ids: frozenset[int],
        matcher: GrammarMatcher | None = None,
    ) -> None:
        """Nothing is generated yet. `matcher` is at the start of the answer; None without `guided`."""
        self.params = params
        self.token_ids = token_ids
        self.num_prompt_tokens = num_prompt_tokens
        self.num_accepted = num_prompt_tokens
        self.processors = tuple(_processors(params, token_ids[:num_prompt_tokens], stop_token_ids, matcher))

    def history(self, length: int) -> History:
        """The first `length` tokens, which are all accepted ones and maybe drafts."""
        if not self.num_accepted <= length <= len(self.token_ids):
            raise ValueError(
                f"a history has to have {self.num_accepted} to {len(self.token_ids)} tokens, not {length}"
            )
        return History(self.token_ids, length, self.num_prompt_tokens, self.num_accepted)

    def accept(self, num_tokens: int) -> None:
        """The last `num_tokens` of the token ids were generated for good.

        Raises ValueError if there are other tokens behind the ones accepted before.
        """
        if self.num_accepted + num_tokens != len(self.token_ids):
            raise ValueError(
                f"{num_tokens} tokens behind {self.num_accepted} accepted ones make no sequence of "
                f"{len(self.token_ids)}"
            )
        accepted = self.token_ids[self.num_accepted :]
        self.num_accepted = len(self.token_ids)
        for processor in self.processors:
            processor.accept(accepted)

    def fork(self, token_ids: array[int], params: SamplingParams) -> SamplingState:
        """The state of another answer to the same prompt: its own tokens, `params` with another seed.

        Raises ValueError if a token was accepted already.
        """
        if self.num_accepted != self.num_prompt_tokens:
            raise ValueError(f"forked with {self.num_accepted - self.num_prompt_tokens} tokens accepted")
        forked = copy.copy(self)
        forked.params = params
        forked.token_ids = token_ids
        forked.processors = tuple(processor.fork() for processor in self.processors)
        return forked


def _processors(
    params: SamplingParams,
    prompt_token_ids: array[int],
    stop_token_ids: frozenset[int],
    matcher: GrammarMatcher | None,
) -> list[LogitsProcessor]:
    processors: list[LogitsProcessor] = []
    if Penalties.wanted(params):
        processors.append(Penalties(params, prompt_token_ids))
    if params.no_repeat_ngram_size:
        processors.append(NoRepeatNGrams(params.no_repeat_ngram_size))
    if params.bad_words_token_ids:
        processors.append(BadWords(params.bad_words_token_ids, stop_token_ids))
    if params.min_tokens and stop_token_ids:
        processors.append(MinTokens(params.min_tokens, stop_token_ids))
    if params.logit_bias:
        processors.append(LogitBias(params.logit_bias))
    if matcher is not None:
        processors.append(GrammarMask(matcher))
    return processors

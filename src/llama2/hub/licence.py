"""What a model's licence asks of its user, shown once, when the model is fetched."""

from __future__ import annotations

import sys

from llama2.console import say
from llama2.hub import store

#: The terms of the Llama 2 Community License and its Acceptable Use Policy in short (18 July 2023).
LLAMA2 = """\
Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.
By using the model you accept that licence and its Acceptable Use Policy; this is only a summary:
- You may use, change and share the model, also commercially. Pass the licence and the line above on with it.
- If on 18 July 2023 the products of you and your affiliates had more than 700 million monthly active users in the
  month before, you need a separate licence from Meta.
- Neither the model nor its output may be used to improve another large language model that is not based on Llama 2.
- Not allowed: breaking the law or others' rights (violence, exploitation, harassment, discrimination, unlicensed
  professional practice, private data, malware); what risks death or injury (weapons, warfare, drugs, critical
  infrastructure, self-harm); deceiving people (fraud, disinformation, impersonation, hiding that an answer is a
  machine's); keeping known dangers of your system from its users.
- There is no warranty. Breaking the terms ends the licence.
Licence: https://ai.meta.com/llama/license/   Use policy: https://ai.meta.com/llama/use-policy/
"""


def show_once(model: str, terms: str) -> None:
    """Print the terms of `model` to stderr, unless they were shown before."""
    record = store.home() / "licences" / f"{model.replace('/', '--')}.json"
    shown = {"model": model, "terms": terms}
    if store.read_record(record) != shown:
        say(f"{model}: {terms.strip()}", file=sys.stderr)
        store.write_record(record, shown)

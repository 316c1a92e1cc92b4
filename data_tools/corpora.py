"""Public corpora as they are: one function per shape, record -> Group. `data_tools.formats` has the table of all."""
from __future__ import annotations

from data_tools.fields import (
    DataError,
    choice,
    completion,
    conversation,
    divide,
    flag,
    listed,
    messages,
    number,
    prompt,
    shorten,
    take,
    text,
    transcript,
)
from data_tools.labels import from_ranks, vote
from data_tools.records import Group, Response


def instruction(record: dict) -> tuple[str, dict]:
    """An Alpaca instruction with its input below, and the other keys."""
    task, rest = take(record, "instruction")
    given = rest.pop("input", None)
    return text(task, "instruction") + (f"\n\n{text(given, 'input')}" if given else ""), rest


def alpaca(record: dict) -> Group:
    """Instruction, input (may be missing or empty), output: a demonstration. Also the outputs of AlpacaEval."""
    task, rest = instruction(record)
    output, meta = take(rest, "output")
    return Group(task, [Response(text(output, "output"))], meta=meta)


def sharegpt_pair(record: dict) -> Group:
    """ShareGPT conversation with a chosen and a rejected last message."""
    turns, chosen, rejected, meta = take(record, "conversations", "chosen", "rejected")
    responses = [Response(completion(chosen, "chosen")), Response(completion(rejected, "rejected"))]
    return Group(messages(turns, "conversations"), responses, [1.0, 0.0], meta=meta)


def rated_conversation(record: dict) -> Group:
    """A conversation whose last message is good or bad (KTO)."""
    turns, label, meta = take(record, "messages", "label")
    asked, answered = conversation(turns, "messages")
    return Group(asked, [Response(answered)], [float(flag(label, "label"))], meta=meta)


def text_score(record: dict) -> Group:
    """Whole dialogues `text` with a `score` each; the first is not always the best, and equal scores are ties."""
    texts, scores, meta = take(record, "text", "score")
    texts, scores = listed(texts, "text"), [number(s, "score") for s in listed(scores, "score")]
    if len(texts) != len(scores) or not texts:
        raise DataError("wrong type", f"'text' has {len(texts)} entries and 'score' has {len(scores)}")
    asked, answers = divide(texts, ["text"] * len(texts))
    return Group(asked, [Response(a, scores={"score": s}) for a, s in zip(answers, scores, strict=True)], scores,
                 meta=meta)


def pandalm(record: dict) -> Group:
    """PandaLM: two responses and three annotators (1 first, 2 second, 0 tie). A few responses are booleans in the file
    and become their text. `meta["votes"]` holds each annotator's P(first preferred)."""
    task, rest = instruction(record)
    first, second, *marks, meta = take(rest, "response1", "response2", "annotator1", "annotator2", "annotator3")
    votes = [choice(mark, "annotator", {0: 0.5, 1: 1.0, 2: 0.0}) for mark in marks]
    names = str(meta.get("cmp_key", "")).split("_")
    notes = [{"generator": n} for n in names] if len(names) == 2 else [{}, {}]
    return Group(task, [Response(str(first), meta=notes[0]), Response(str(second), meta=notes[1])],
                 wins=vote([[v, 1 - v] for v in votes]), meta={**meta, "votes": votes})


def alpaca_eval(record: dict) -> Group:
    """AlpacaEval annotations: `preference` in [1, 2] is 1 + P(output_2 preferred), so wins[0][1] = 2 - preference."""
    task, rest = instruction(record)
    first, second, preference, meta = take(rest, "output_1", "output_2", "preference")
    win = 2.0 - number(preference, "preference")
    responses = [Response(text(output, f"output_{n}"),
                          meta={"generator": meta.pop(key)} if (key := f"generator_{n}") in meta else {})
                 for n, output in ((1, first), (2, second))]
    return Group(task, responses, wins=[[0.5, win], [1.0 - win, 0.5]], meta=meta)


def llmbar(record: dict) -> Group:
    """LLMBar: `label` 1 or 2 names the better output."""
    task, first, second, label, meta = take(record, "input", "output_1", "output_2", "label")
    best = choice(label, "label", {1: 0, 2: 1})
    return Group(text(task, "input"), [Response(text(first, "output_1")), Response(text(second, "output_2"))],
                 [1.0 - best, float(best)], meta=meta)


def gsm8k_solutions(record: dict) -> Group:
    """GSM8K example model solutions: one response per system, relevance 1 where `is_correct`."""
    question, truth, rest = take(record, "question", "ground_truth")
    systems = {name: value for name, value in rest.items() if isinstance(value, dict) and "solution" in value}
    if not systems:
        raise DataError("missing key", f"no system with a 'solution' among the keys {', '.join(record)}")
    responses, relevance = [], []
    for name, value in systems.items():
        correct, solution, other = take(value, "is_correct", "solution")
        responses.append(Response(text(solution, "solution"), meta={"generator": name, **other}))
        relevance.append(float(flag(correct, "is_correct")))
    return Group(text(question, "question"), responses, relevance,
                 meta={"answer": truth, **{k: v for k, v in rest.items() if k not in systems}})


def themis(record: dict) -> Group:
    """Themis: `pos_answer` over `neg_answer`. Actions and the scorer's explanation stay in the response's meta; a
    `context` (the translation questions) stands before the question."""
    question, good, bad, meta = take(record, "question", "pos_answer", "neg_answer")
    context = meta.pop("context", None)
    responses = []
    for answer in (good, bad):
        words, score, notes = take(answer, "answer", "score")
        responses.append(Response(text(words, "answer"), scores={"score": number(score, "score")}, meta=notes))
    question = text(question, "question")
    return Group(f"{context}\n\n{question}" if context else question, responses, [1.0, 0.0], meta=meta)


def finegrained_qa(record: dict) -> Group:
    """Fine-grained QA feedback: four predictions and a preference for each of the pairs (1,2) (1,3) (1,4) (2,3) (2,4)
    (3,4): 1 first, 2 second, 0 tie. The prompt is passages and question; `feedback` (spans of the first prediction)
    and the preferences stay in meta, the reference is `meta["answer"]`."""
    question, passages, gold, feedback, preference, *answers, meta = take(
        record, "question", "passages", "gold", "feedback", "preference", *(f"prediction {n}" for n in (1, 2, 3, 4)))
    first = [choice(p, "preference", {0: 0.5, 1: 1.0, 2: 0.0}) for p in listed(preference, "preference")]
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    if len(first) != len(pairs):
        raise DataError("label out of range", f"'preference' should have 6 entries, it has {len(first)}")
    wins = [[0.5] * 4 for _ in range(4)]
    for (i, j), win in zip(pairs, first, strict=True):
        wins[i][j], wins[j][i] = win, 1.0 - win
    context = [f"{title}\n{' '.join(sentences)}" for title, *sentences in passages]
    responses = [Response(text(answer, f"prediction {n}")) for n, answer in enumerate(answers, 1)]
    return Group("\n\n".join([*context, text(question, "question")]), responses, wins=wins,
                 meta={**meta, "answer": gold, "feedback": feedback, "preference": preference})


def bigbench_mistake(record: dict) -> Group:
    """BIG-Bench-Mistake: reasoning steps with the index of the first mistake (null: none). Relevance 1 is a trace
    without a mistake; steps before the mistake are right, it is wrong, later ones are unknown; the score `correct`
    says whether the final answer is the target."""
    task, steps, target, answer, mistake, meta = take(record, "input", "steps", "target", "answer", "mistake_index")
    steps = listed(steps, "steps")
    if mistake is not None and (not isinstance(mistake, int) or not 0 <= mistake < len(steps)):
        raise DataError("label out of range", f"'mistake_index' should be null or 0 to {len(steps) - 1}, "
                                              f"found {shorten(mistake)}")
    right = [True] * len(steps) if mistake is None else \
        [True] * mistake + [False] + [None] * (len(steps) - mistake - 1)
    response = Response("\n".join(text(s, "steps") for s in steps), scores={"correct": float(answer == target)},
                        meta={"steps": steps, "step_labels": right})
    return Group(text(task, "input"), [response], [float(mistake is None)],
                 meta={**meta, "answer": target, "mistake_index": mistake})


def domains(record: dict) -> Group:
    """Domain-specific preferences: one response per domain, not labelled (every domain prefers its own)."""
    query, answers, meta = take(record, "query", "responses")
    if not isinstance(answers, dict):
        raise DataError("wrong type", "'responses' should be an object with one response per domain")
    responses = [Response(text(answer, domain), meta={"domain": domain}) for domain, answer in answers.items()]
    return Group(text(query, "query"), responses, meta=meta)


def ultrafeedback(record: dict) -> Group:
    """UltraFeedback: completions with `overall_score`, or else with `annotations` whose mean rating is the relevance.
    Every rating is a score of the response; "N/A" is none. Critiques and models stay in the response's meta."""
    task, rest = instruction(record)
    answers, meta = take(rest, "completions")
    responses, relevance = [], []
    for answer in listed(answers, "completions"):
        words, notes = take(answer, "response")
        ratings = {aspect: number(notes["Rating"], f"Rating of {aspect}")
                   for aspect, notes in notes.get("annotations", {}).items()
                   if isinstance(notes, dict) and notes.get("Rating", "N/A") != "N/A"}
        overall = {k: number(notes.pop(k), k) for k in ("overall_score", "fine-grained_score")
                   if notes.get(k) is not None}
        responses.append(Response(text(words, "response"), scores={**overall, **ratings}, meta=notes))
        mean = sum(ratings.values()) / len(ratings) if ratings else None
        relevance.append(overall.get("overall_score", mean))
    return Group(task, responses, relevance, meta=meta)


HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def helpsteer(record: dict) -> Group:
    """HelpSteer: one response per record, graded by helpfulness; records of one prompt that follow each other are
    joined to one group. All attributes are scores of the response."""
    asked, answer, helpfulness, rest = take(record, "prompt", "response", "helpfulness")
    scores = {"helpfulness": number(helpfulness, "helpfulness"),
              **{k: number(rest.pop(k), k) for k in HELPSTEER if k in rest}}
    return Group(prompt(asked), [Response(completion(answer, "response"), scores=scores, meta=rest)],
                 [scores["helpfulness"]])


def shp(record: dict) -> Group:
    """Stanford Human Preferences: `labels` 1 prefers A, 0 prefers B; `score_A` and `score_B` are scores."""
    history, first, second, label, meta = take(record, "history", "human_ref_A", "human_ref_B", "labels")
    best = float(flag(label, "labels"))
    responses = [Response(text(answer, f"human_ref_{side}"),
                          scores={"score": number(meta.pop(key), key)} if (key := f"score_{side}") in meta else {})
                 for side, answer in (("A", first), ("B", second))]
    return Group(text(history, "history"), responses, [best, 1.0 - best], meta=meta)


def nectar(record: dict) -> Group:
    """Nectar: seven `answers` with `rank` (1 is best; ranks may repeat); the prompt is a transcript."""
    asked, answers, meta = take(record, "prompt", "answers")
    responses, ranks = [], []
    for answer in listed(answers, "answers"):
        words, rank, notes = take(answer, "answer", "rank")
        responses.append(Response(text(words, "answer"), meta=notes))
        ranks.append(number(rank, "rank"))
    turns = transcript(asked) if isinstance(asked, str) else None
    if turns and turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return Group(turns or prompt(asked), responses, from_ranks(ranks), meta=meta)

"""What the language model is told before each of ChatDiT's questions.

One text per question: its task, the request, the reply, the rules. `chatdit_contracts` checks the replies.
"""

from __future__ import annotations

_JSON = (
    "Reply with one JSON object with exactly these keys and nothing around it. `explanation` is one or two "
    "sentences on how you decided."
)

SELECTION = f"""You find out which earlier pictures of a conversation a new message is about.

Request: {{"instruction": the message, "input_image_count": how many pictures came with it,
"memory": [{{"image_id", "description"}}, ...] the pictures of the conversation, oldest first}}.
Reply: {{"explanation": text, "image_ids": [identifiers from memory]}}.
{_JSON}

Rules:
- Name a picture only if the message changes it, continues it, or asks for something like it.
- "it" and "this" usually mean the newest picture; ordinals count the pictures of the conversation.
- Give the identifiers in the order in which the message needs them, each once.
- An empty list is right for a message that stands alone or is only about the pictures that came with it.
"""

DESCRIPTION = f"""You describe the given pictures, so that somebody who does not see them could draw them.

Request: {{"instruction": the message that came with the pictures, "input_image_count": n}} and n pictures.
Reply: {{"explanation": text, "descriptions": {{"overview": text,
"input_images": [{{"image_id": "input_0001_some-words", "description": text}}, ...]}}}}.
{_JSON}

Rules:
- One entry for every picture, in their order: input_0001_, input_0002_ and so on, then two or three words.
- Say only what can be seen: subjects, setting, arrangement, style, colours, light.
- Every description stands alone; never refer from one to another. Use the same words for what recurs.
- Do not describe what the message asks for.
"""

COUNTING = f"""You decide how many pictures a message asks for.

Request: {{"instruction": the message, "input_image_count": n}}.
Reply: {{"explanation": text, "input_image_count": n again, "output_image_count": whole number, at least 1}}.
{_JSON}

Rules:
- A number that the message gives counts. "some" is 2 or 3, "multiple" and "several" 3 to 5.
- A series, a story or a progression has 3 to 10 pictures; comparisons and variations have more than one.
- Anything else is one picture.
"""

PROMPTING = f"""You describe the pictures that a message asks for, one prompt for each.

Request: {{"instruction": the message, "input_image_count", "output_image_count": k,
"descriptions": {{"input_images_overview", "input_images"}} of the pictures that are given, if any}}.
Reply: {{"explanation": text, "descriptions": {{"overview": text,
"output_images": [{{"image_id": "output_0001_some-words", "description": text}}, ...]}}}}.
{_JSON}

Rules:
- k entries, in order: output_0001_, output_0002_ and so on, then two or three words.
- Every description is complete by itself: subjects, setting, style, light. Repeat what pictures share word by
  word; never write "the same as before". `overview` says what they share.
- Keep everything of given pictures that the message does not change.
- Somebody who appears in several pictures gets a name in angle brackets, such as <Mira>, in all of them.
"""

PROMPTING_ONE = f"""You describe the picture that a message asks for.

Request: {{"instruction": the message, "input_image_count": 0, "output_image_count": 1}}.
Reply: {{"explanation": text, "prompt": what the picture shows, "image_id": "output_0001_some-words"}}.
{_JSON}

Rules:
- The prompt is complete by itself: subjects, setting, arrangement, style, light.
- Keep the words of the message where they describe; add nothing that contradicts them.
"""

PANELIZING = f"""You write one prompt for a picture that is divided into panels.

Request: {{"instruction": the message, "input_image_count", "output_image_count", "descriptions": of all
pictures of the task, "panels": {{"panel_1": {{"image_id", "description"}}, ...}}}}.
Reply: {{"explanation": text, "prompt": one paragraph}}.
{_JSON}

Rules:
- Begin with the number of panels in square brackets, such as [TWO-PANEL], and one sentence on what all
  panels share and how they relate.
- Then every panel once, in order: [PANEL-1] and its description, [PANEL-2] and its description, and so on.
- Cover all panels, invent nothing, write English, use no other square brackets.
"""

ARTICLE = """You write a short illustrated article around pictures that are already drawn.

Request: {"instruction": the message, "input_image_count", "output_image_count",
"descriptions": [{"image_id", "description"}, ...]}.
Reply: Markdown alone.

Rules:
- Show every picture whose identifier begins with output_ once, in order, as ![short text](<image_id>.png)
  with the identifier in place of <image_id> and no angle brackets. Pictures that begin with input_ may be
  shown. Show no other picture, and use no HTML and no reference links.
- A story or picture book: a title, then a few sentences of the story around each picture.
- Instructions: a title, then numbered steps, each with its picture.
- A comparison: a title, the pictures, and what distinguishes them.
"""

"""A place to try a checkpoint: completion, filling in at the cursor, chat, as the model writes. `make try`.

    python -m eval.app --model runs/tiny/lcft/model             http://127.0.0.1:7860
    python -m eval.app --model me/my-model --space me/try-it    push this very file as a Space that opens that model

What comes in: a checkpoint folder or a Hub id. What goes out: a Gradio page on this machine alone, with a tab for whatever
the checkpoint can do: infilling where its tokenizer has the four tokens, chat where it has a template.

This file is all that the Space runs, so it imports nothing of codetune: infilling ids are put together here as
`codetune.tokens` does it (a test compares them). It has one model and answers one request at a time; it is no server for
many. What it does not do: run what the model writes.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SENTINELS = ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>")
MARK = "\u263a"  # no vocabulary joins it with what follows: text behind it is encoded without an implicit space
AT_CURSOR = """(text) => {
  const box = document.querySelector("#code textarea");
  return [text.slice(0, box.selectionStart), text.slice(box.selectionEnd)];
}"""
EXAMPLE = "def mean(values):\n    total = \n    return total / len(values)\n"
EXAMPLE_CURSOR = len("def mean(values):\n    total = ")


class Model:
    """A checkpoint that writes, token by token."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
            self.model: Any = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype="auto")
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{name}: no checkpoint that transformers can load, neither as a folder nor on the Hub ({error})"
            ) from error
        if torch.cuda.is_available():
            self.model = self.model.to("cuda")
        self.model.eval()
        self.name = name
        self.context: int = self.model.config.max_position_embeddings
        vocabulary = self.tokenizer.get_vocab()
        self.sentinels = [vocabulary.get(content) for content in SENTINELS]
        self.infills = None not in self.sentinels
        self.chats = self.tokenizer.chat_template is not None
        self.leading_space = self.tokenizer.convert_ids_to_tokens(self.encode("x"))[0].startswith(("▁", "Ġ"))
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Text as it stands at the start of a document; what looks like a control token in it is text."""
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def bare(self, text: str) -> list[int]:
        """Text as it stands inside a document: without the space that some tokenizers put before a text."""
        if not self.leading_space:
            return self.encode(text)
        return self.encode(MARK + text)[len(self.encode(MARK)) :]

    def prompt_ids(self, text: str) -> list[int]:
        start = self.tokenizer.bos_token_id
        return [*([] if start is None else [start]), *self.encode(text)]

    def infill_ids(self, prefix: str, suffix: str) -> list[int]:
        """`<s> <PRE> enc(prefix) <SUF> bare(suffix) <MID>`"""
        before, after, middle, _ = self.sentinels
        start = self.tokenizer.bos_token_id
        return [*([] if start is None else [start]), before, *self.encode(prefix), after, *self.bare(suffix), middle]

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The template of the checkpoint, with the turn left to the model."""
        found = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return list(found["input_ids"] if hasattr(found, "keys") else found)

    def write(self, ids: Sequence[int], new_tokens: int, temperature: float) -> Iterator[str]:
        """The text so far, again and again, until the model stops.

        Raises:
            ValueError: the prompt fills the context.
        """
        room = self.context - len(ids)
        if room < 1:
            raise ValueError(f"the prompt has {len(ids)} tokens, the model's context {self.context}; shorten it")
        with self._lock:
            yield from self._write(list(ids), min(new_tokens, room), temperature)

    def _write(self, ids: list[int], new_tokens: int, temperature: float) -> Iterator[str]:
        import torch
        from transformers import StoppingCriteriaList

        tokens: queue.Queue[Any] = queue.Queue()
        left = threading.Event()

        class Streamer:
            first = True

            def put(self, value: torch.Tensor) -> None:
                if not self.first:  # the first ones are the prompt
                    tokens.put(value.flatten().tolist())
                self.first = False

            def end(self) -> None:
                tokens.put(None)

        def has_left(input_ids: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
            del rest, more
            return torch.full((input_ids.shape[0],), left.is_set(), device=input_ids.device)

        ids_BT = torch.tensor([ids], device=self.model.device)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": 0.95}
        settings = sampling if temperature > 0 else {"do_sample": False}

        def run() -> None:
            try:
                self.model.generate(
                    ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    max_new_tokens=new_tokens,
                    streamer=Streamer(),
                    stopping_criteria=StoppingCriteriaList([has_left]),
                    pad_token_id=self.tokenizer.eos_token_id or 0,
                    **settings,
                )
            except Exception as error:  # noqa: BLE001  (handed over to the page's thread, and raised there)
                tokens.put(error)

        worker = threading.Thread(target=run, daemon=True)
        worker.start()
        written: list[int] = []
        try:
            while (item := tokens.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                written += item
                text = self.decode(written)
                if not text.endswith("\ufffd"):  # in the middle of a character
                    yield text
            yield self.decode(written)
        finally:
            left.set()
            worker.join()

    def decode(self, ids: list[int]) -> str:
        """Text that goes on from other text: a leading space of its first piece stays."""
        anchor = self.encode("x")
        return self.tokenizer.decode([*anchor, *ids], skip_special_tokens=True)[len(self.tokenizer.decode(anchor)) :]


def build_page(model: Model) -> Any:
    """The page."""
    import gradio as gr
    from gradio.themes import Soft

    fonts = ["system-ui", "sans-serif"]
    theme = Soft(font=fonts, font_mono=["ui-monospace", "monospace"])  # none that would be fetched

    def failing(steps: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from steps
        except ValueError as error:
            raise gr.Error(str(error)) from error

    def complete(text: str, new_tokens: float, temperature: float) -> Iterator[str]:
        for written in failing(model.write(model.prompt_ids(text), int(new_tokens), temperature)):
            yield text + written

    def fill(prefix: str, suffix: str, new_tokens: float, temperature: float) -> Iterator[str]:
        for written in failing(model.write(model.infill_ids(prefix, suffix), int(new_tokens), temperature)):
            yield prefix + written + suffix

    def answer(message: str, history: list[dict[str, Any]], new_tokens: float, temperature: float) -> Iterator[str]:
        turns = [{"role": turn["role"], "content": text_of(turn["content"])} for turn in history]
        yield from failing(
            model.write(model.chat_ids([*turns, {"role": "user", "content": message}]), int(new_tokens), temperature)
        )

    with gr.Blocks(title=f"try {Path(model.name).name}", analytics_enabled=False) as page:
        gr.Markdown(
            f"### `{model.name}`\ncontext {model.context:,} tokens. What it writes may be wrong: read before you run."
        )
        with gr.Row():
            new_tokens = gr.Slider(1, 1024, 128, step=1, label="new tokens, at most")
            temperature = gr.Slider(0.0, 1.5, 0.0, step=0.05, label="temperature (0: the likeliest token)")
        with gr.Tab("Complete"):
            text = gr.Textbox("def fibonacci(n):\n", lines=14, label="the model goes on from here", elem_id="text")
            with gr.Row():
                start = gr.Button("Go on", variant="primary")
                stop = gr.Button("Stop")
            running = start.click(complete, [text, new_tokens, temperature], text, api_name="complete")
            stop.click(None, cancels=running)
        if model.infills:
            with gr.Tab("Fill in"):
                code = gr.Textbox(
                    EXAMPLE,
                    lines=14,
                    label="put the cursor where something is missing; what is selected is replaced",
                    elem_id="code",
                )
                with gr.Row():
                    start = gr.Button("Fill in at the cursor", variant="primary", elem_id="fill")
                    stop = gr.Button("Stop")
                hidden = [gr.Textbox(visible=False), gr.Textbox(visible=False)]
                running = start.click(None, [code], hidden, js=AT_CURSOR).then(
                    fill, [*hidden, new_tokens, temperature], code, api_name="fill"
                )
                stop.click(None, cancels=running)
        if model.chats:
            with gr.Tab("Chat"):
                gr.ChatInterface(answer, additional_inputs=[new_tokens, temperature], api_name="chat")
    page.theme = theme
    return page


def text_of(content: Any) -> str:
    """A turn's words; Gradio hands them over as text or as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)


# ---------------------------------------------------------------------------------------------------------------------
# As a Space


def space_files(model: str, versions: dict[str, str]) -> dict[str, str]:
    """The files of a Space that opens a model of the Hub: this one, what it needs, and a card."""
    title = model.rpartition("/")[2]
    head = {"title": title, "sdk": "gradio", "sdk_version": versions["gradio"], "app_file": "app.py", "models": [model]}
    lines = json.dumps(head, indent=1)  # YAML too
    card = f"---\n{lines}\n---\n\nCompletion, filling in and chat with [{model}](https://huggingface.co/{model}).\n"
    needs = "".join(f"{name}=={versions[name]}\n" for name in ("torch", "transformers", "accelerate"))
    source = Path(__file__).read_text(encoding="utf-8")
    mark = json.dumps({"opens": model}) + "\n"  # by which the next push knows the Space as one of ours
    return {"app.py": source, "README.md": card, "requirements.txt": needs, "model.txt": f"{model}\n", "manifest.json": mark}


def push_space(model: str, repository: str, dry_run: bool, replace: bool = False) -> None:
    """Push the Space, private, or list what would go.

    Raises:
        ValueError: the model is a folder, the Hub refused, or the Space holds something else.
    """
    import tempfile
    from importlib import metadata

    from codetune.upload import Target, entries, upload

    if Path(model).is_dir():
        raise ValueError(
            f"{model} is a folder here, which a Space cannot open; publish it first, and give its name on the Hub"
        )

    def whose(manifest: dict[str, Any] | None) -> str | None:
        return None if manifest and "opens" in manifest else "files that are no such page"

    versions = {name: metadata.version(name).partition("+")[0] for name in ("gradio", "torch", "transformers", "accelerate")}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, content in space_files(model, versions).items():
            (folder / name).write_text(content, encoding="utf-8")
        for entry in entries(folder):
            print(f"  {entry.size_bytes:>10,}  {entry.path}")
        if dry_run:
            print("dry run: nothing was sent")
            return
        target = Target(repository, kind="space", replace=replace)
        done = upload(folder, target, f"try {model}", whose)
    print(f"space: {done.address}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; in a Space, without arguments, the model that `model.txt` beside this file names."""
    beside = Path(__file__).with_name("model.txt")
    parser = argparse.ArgumentParser(prog="python -m eval.app", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default=beside.read_text().strip() if beside.is_file() else None, help="folder, or Hub id"
    )
    parser.add_argument("--revision", help="of a Hub id")
    parser.add_argument("--port", type=int, default=7860, help="on this machine alone")
    parser.add_argument("--space", help="owner/name: push this page as a Space that opens the model, private")
    parser.add_argument("--dry-run", action="store_true", help="with --space: list what would go")
    parser.add_argument("--replace", action="store_true", help="with --space: write over whatever the Space holds")
    options = parser.parse_args(arguments)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        if options.model is None:
            raise ValueError("say which model: --model runs/tiny/lcft/model, or a Hub id")
        if options.space:
            push_space(options.model, options.space, options.dry_run, options.replace)
            return
        page = build_page(Model(options.model, options.revision))
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    in_space = bool(os.environ.get("SPACE_ID"))
    page.launch(server_name="0.0.0.0" if in_space else "127.0.0.1", server_port=options.port, share=False, theme=page.theme)


if __name__ == "__main__":
    main()

"""llama.cpp as the other side of peers.py; it runs in an environment of its own.

    python -m venv peers && peers/bin/pip install llama-cpp-python gguf
    peers/bin/python benchmarks/llama_peer.py write transformer big/transformer.gguf
    peers/bin/python benchmarks/llama_peer.py serve big/transformer.gguf --context 33000

`write` makes GGUF files of the full size with random weights: `transformer` has mmMamba's shape
(32 layers, 2048, 16 heads, 8 of them for keys, MLP of 8192, vocabulary 92,553), Q4_0 with the head
in Q6_K as llama.cpp's own Q4_0 files; `mamba2` is a plain Mamba-2 of about as many bytes. `serve`
answers JSON lines: {"do": "prefill", "tokens": 512}, {"do": "decode", "tokens": 32}, "reset",
"save", "restore", "rss", and {"do": "fill", "tokens": 32768}: a cache of so many tokens without
reading them, the first 512 tokens' keys and values again and again. How long a token takes depends
on how many there are, not on what they say. {"do": "logits", "ids": [...], "to": FILE.npy} writes
the logits of every position. `quantize PLAIN.gguf OUT.gguf --type Q4_K_M` is llama.cpp's own.
"""

import argparse
import json
import resource
import struct
import sys
import time
from pathlib import Path

import numpy as np

HIDDEN, MLP, HEADS, KV_HEADS, LAYERS, VOCAB = 2048, 8192, 16, 8, 32, 92_553
FLASH = {"auto": -1, "off": 0, "on": 1}  # llama.h
INNER, STATE, SSM_LAYERS = 4096, 128, 60  # of mamba2: about as many bytes as the transformer


def write(kind: str, path: Path) -> None:
    """A GGUF of random weights."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama" if kind == "transformer" else "mamba2")
    writer.add_context_length(131_072)
    writer.add_embedding_length(HIDDEN)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("none")
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int, kind=gguf.GGMLQuantizationType.Q4_0) -> None:
        size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (rows, columns // size, nbytes), np.uint8)
        scale = np.float16(columns**-0.5 / (4 if nbytes == 18 else 300)).tobytes()
        at = slice(0, 2) if kind == gguf.GGMLQuantizationType.Q4_0 else slice(nbytes - 2, nbytes)
        blocks[..., at] = np.frombuffer(scale, np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=kind)

    def ones(name: str, *shape: int, value: float = 1.0) -> None:
        writer.add_tensor(name, np.full(shape, value, np.float32))

    matrix("token_embd.weight", VOCAB, HIDDEN)
    matrix("output.weight", VOCAB, HIDDEN, gguf.GGMLQuantizationType.Q6_K)
    ones("output_norm.weight", HIDDEN)
    if kind == "transformer":
        writer.add_block_count(LAYERS)
        writer.add_feed_forward_length(MLP)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_dimension_count(HIDDEN // HEADS)
        writer.add_rope_freq_base(1e6)
        for i in range(LAYERS):
            ones(f"blk.{i}.attn_norm.weight", HIDDEN)
            ones(f"blk.{i}.ffn_norm.weight", HIDDEN)
            matrix(f"blk.{i}.attn_q.weight", HIDDEN, HIDDEN)
            matrix(f"blk.{i}.attn_k.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
            matrix(f"blk.{i}.attn_v.weight", HIDDEN * KV_HEADS // HEADS, HIDDEN)
            matrix(f"blk.{i}.attn_output.weight", HIDDEN, HIDDEN)
            matrix(f"blk.{i}.ffn_gate.weight", MLP, HIDDEN)
            matrix(f"blk.{i}.ffn_up.weight", MLP, HIDDEN)
            matrix(f"blk.{i}.ffn_down.weight", HIDDEN, MLP)
    else:
        heads = INNER // 64
        writer.add_block_count(SSM_LAYERS)
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(INNER)
        writer.add_ssm_state_size(STATE)
        writer.add_ssm_time_step_rank(heads)
        writer.add_ssm_group_count(1)
        for i in range(SSM_LAYERS):
            ones(f"blk.{i}.attn_norm.weight", HIDDEN)
            matrix(f"blk.{i}.ssm_in.weight", 2 * INNER + 2 * STATE + heads, HIDDEN)
            ones(f"blk.{i}.ssm_conv1d.weight", INNER + 2 * STATE, 4, value=0.25)
            ones(f"blk.{i}.ssm_conv1d.bias", INNER + 2 * STATE, value=0.0)
            ones(f"blk.{i}.ssm_dt.bias", heads, value=-4.0)
            ones(f"blk.{i}.ssm_a", heads, 1, value=-1.0)
            ones(f"blk.{i}.ssm_d", heads, 1, value=1.0)
            ones(f"blk.{i}.ssm_norm.weight", 1, INNER)
            matrix(f"blk.{i}.ssm_out.weight", HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


class Model:
    """A context of llama.cpp, by its C interface."""

    def __init__(self, path: Path, context: int, threads: int, flash: int = -1) -> None:
        import llama_cpp as c  # pyright: ignore[reportMissingImports]

        self.c, self.saved, self.kept, self.rng = c, None, 0, np.random.default_rng(0)
        c.llama_backend_init()
        self.log = c.llama_log_callback(lambda level, text, data: None)
        c.llama_log_set(self.log, None)
        self.model = c.llama_model_load_from_file(
            str(path).encode(), c.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp cannot load it")
        params = c.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash
        self.context = c.llama_init_from_model(self.model, params)
        self.memory = c.llama_get_memory(self.context)

    def read(self, count: int) -> None:
        """Read random tokens, at most 512 in a call."""
        while count:
            part = min(count, 512)
            ids = (self.c.llama_token * part)(*map(int, self.rng.integers(0, VOCAB, part)))
            assert self.c.llama_decode(self.context, self.c.llama_batch_get_one(ids, part)) == 0
            count -= part
        self.c.llama_synchronize(self.context)

    def fill(self, count: int) -> None:
        """As if `count` tokens, a multiple of 512, had been read (transformers only)."""
        c, part = self.c, 512
        c.llama_memory_clear(self.memory, True)
        self.read(part)
        size = c.llama_state_seq_get_size(self.context, 0)
        short = (c.ctypes.c_uint8 * size)()
        c.llama_state_seq_get_data(self.context, short, size, 0)
        short, at = bytes(short), 16 + 12 * part  # after the cells, 12 bytes each
        magic, _, streams, cells = struct.unpack_from("<4I", short)
        transposed, layers = struct.unpack_from("<2I", short, at)
        if (streams, cells, layers) != (1, part, LAYERS) or count % part:
            raise SystemExit("fill: this llama.cpp keeps its cache in another form")
        # Magic and number of streams, cells (position, one sequence, its id), layers' keys, values.
        whole = bytearray(struct.pack("<4I", magic, 0, 1, count))
        for position in range(count):
            whole += struct.pack("<3I", position, 1, 0)
        whole += short[at : at + 8]
        at += 8
        for i in range(2 * layers):
            if i < layers or not transposed:  # type, bytes of a row; a row for each token
                head, runs = 12, [struct.unpack_from("<IQ", short, at)[1] * part]
            else:  # type, bytes of an element, channels; a run of tokens for each channel
                _, element, channels = struct.unpack_from("<3I", short, at)
                head, runs = 12, [element * part] * channels
            whole += short[at : at + head]
            at += head
            for run in runs:
                whole += short[at : at + run] * (count // part)
                at += run
        buffer = (c.ctypes.c_uint8 * len(whole)).from_buffer(whole)
        c.llama_memory_clear(self.memory, True)
        if not c.llama_state_seq_set_data(self.context, buffer, len(whole), 0):
            raise SystemExit(f"fill: no room for {count} tokens")
        self.kept = count

    def logits(self, ids: list[int], path: str) -> None:
        """Logits of all positions of a sequence that begins anew, (tokens, vocabulary)."""
        c = self.c
        c.llama_memory_clear(self.memory, True)
        vocab, out = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model)), []
        batch = c.llama_batch_init(512, 0, 1)
        for start in range(0, len(ids), 512):
            part = ids[start : start + 512]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            assert c.llama_decode(self.context, batch) == 0
            found = c.llama_get_logits(self.context)
            out.append(np.ctypeslib.as_array(found, (len(part), vocab)).copy())
        c.llama_batch_free(batch)
        np.save(path, np.concatenate(out))

    def answer(self, asked: dict) -> dict:
        """Carry out a request."""
        did, tokens = asked["do"], asked.get("tokens", 0)
        began = time.perf_counter()
        if did == "prefill":
            self.read(tokens)
        elif did == "decode":
            spent = []
            for _ in range(tokens):
                tick = time.perf_counter()
                self.read(1)
                spent.append(time.perf_counter() - tick)
            return {"each": spent}
        elif did == "logits":
            self.logits(asked["ids"], asked["to"])
        elif did == "fill":
            self.fill(tokens)
        elif did == "reset":
            self.c.llama_memory_clear(self.memory, True)
        elif did == "save":
            size = self.c.llama_state_get_size(self.context)
            self.saved = (self.c.ctypes.c_uint8 * size)()
            self.c.llama_state_get_data(self.context, self.saved, size)
        elif did == "restore" and self.kept:
            self.c.llama_memory_seq_rm(self.memory, 0, self.kept, -1)
        elif did == "restore":
            assert self.saved is not None
            self.c.llama_state_set_data(self.context, self.saved, len(self.saved))
        elif did == "rss":
            return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        return {"seconds": time.perf_counter() - began}


def quantize(source: str, target: str, kind: str) -> dict:
    """llama.cpp's quantiser; bytes, weights and kinds of the layers' matrices."""
    import gguf
    import llama_cpp as c  # pyright: ignore[reportMissingImports]

    c.llama_backend_init()
    log = c.llama_log_callback(lambda level, text, data: None)
    c.llama_log_set(log, None)
    params = c.llama_model_quantize_default_params()
    params.ftype = getattr(c, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if c.llama_model_quantize(source.encode(), target.encode(), params):
        raise SystemExit(f"{source}: llama.cpp cannot quantise it to {kind}")
    made: dict = {"bytes": 0, "weights": 0, "kinds": {}}
    for tensor in gguf.GGUFReader(target).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            made["bytes"] += int(tensor.n_bytes)
            made["weights"] += int(tensor.n_elements)
            name = tensor.tensor_type.name
            made["kinds"][name] = made["kinds"].get(name, 0) + 1
    return made


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("verb", choices=("write", "serve", "quantize"))
    parser.add_argument("what", help="write: transformer or mamba2; else the file")
    parser.add_argument("path", nargs="?", type=Path)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--type", default="Q4_0", help="quantize: Q4_0, Q4_K_M, Q8_0, ...")
    parser.add_argument(
        "--flash-attention", default="auto", choices=("auto", "off", "on"), help="of llama.cpp"
    )
    args = parser.parse_args()
    if args.verb == "write":
        if args.what not in ("transformer", "mamba2") or args.path is None:
            parser.error("write transformer|mamba2 FILE")
        write(args.what, args.path)
        return 0
    if args.verb == "quantize":
        print(json.dumps(quantize(args.what, str(args.path), args.type)))
        return 0
    model = Model(Path(args.what), args.context, args.threads, FLASH[args.flash_attention])
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(model.answer(json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

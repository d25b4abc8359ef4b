// Other engines in this worker, to take turns with ours on the same GPU. Each is the user's own: the address of its
// library, and that of a model in the form that it reads.
//
// openPeer(kind, library, model, context) is a promise, for runs of up to `context` tokens, of
//     versions                  by package
//     fill(ids, text)           a promise: its cache holds `ids` and no more; `text` is what they say, without BOS
//     run(ids, text, decode)    a promise of { cached, ids, seconds }: `decode` tokens after the first new one, greedily;
//                               seconds to the first, and from each to the next; `cached` counts the tokens that the cache
//                               held before
//     close()
const now = () => performance.now() / 1000;

const between = (times) => times.slice(1).map((time, n) => time - times[n]);

const download = async (address) => {
    const response = await fetch(address);
    if (!response.ok) throw new Error(`${address}: ${response.status} ${response.statusText}`);
    return response.blob();
};

const folderOf = (address) => new URL(".", address).href;

// transformers.js on WebGPU: https://github.com/huggingface/transformers.js. `library` is its transformers.min.js, with the
// ort-wasm-simd-threaded.asyncify files of onnxruntime-web beside it; `model` a folder with onnx/model.onnx.
const transformers = async (library, model) => {
    const { AutoModelForCausalLM, Tensor, env } = await import(library);
    const file = (ending) => new URL(`ort-wasm-simd-threaded.asyncify.${ending}`, library).href;
    env.backends.onnx.wasm.wasmPaths = { mjs: file("mjs"), wasm: file("wasm") };
    Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, localModelPath: folderOf(model) });
    env.useBrowserCache = false; // which a large model fills
    const name = new URL(model).pathname.split("/").at(-1);
    const engine = await AutoModelForCausalLM.from_pretrained(name, { device: "webgpu", dtype: "fp32" });
    engine.generation_config.eos_token_id = null; // runs go on past the end of the text
    let cache;
    let held = [];

    const generate = (ids, options) => {
        const inputs = new Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
        const kept = cache ? { past_key_values: cache } : {};
        return engine.generate({ inputs, ...kept, do_sample: false, return_dict_in_generate: true, ...options });
    };
    const empty = async () => {
        await cache?.dispose();
        cache = undefined;
        held = [];
    };

    return {
        versions: { "transformers.js": env.version, "onnxruntime-web": env.backends.onnx.versions.web },
        async fill(ids) {
            await empty();
            if (!ids.length) return;
            cache = (await generate(ids, { max_new_tokens: 1 })).past_key_values;
            held = ids;
        },
        async run(ids, _, decode) {
            const times = [now()];
            const found = [];
            let prompt = true; // which it is given first
            const streamer = {
                put([tokens]) {
                    if (!prompt) {
                        found.push(Number(tokens[0]));
                        times.push(now());
                    }
                    prompt = false;
                },
                end() {},
            };
            const cached = held.length;
            cache = (await generate([...held, ...ids], { max_new_tokens: decode + 1, streamer })).past_key_values;
            return { cached, ids: found, seconds: between(times) };
        },
        async close() {
            await empty();
            await engine.dispose();
        },
    };
};

// wllama, which is llama.cpp, on WebGPU where that can be had: https://github.com/ngxson/wllama. `library` is its esm/index.js,
// with wasm/wllama.wasm beside it; `model` a GGUF. It takes no ids, only text, of which it must make as many tokens as we do.
const wllama = async (library, model, context) => {
    const { Wllama } = await import(library);
    let device = "the CPU";
    const hear = (line) => {
        if (/WebGPU model buffer/.test(line)) device = "WebGPU"; // which it says nowhere else
    };
    const logger = { debug: hear, log: hear, warn: hear, error: hear };
    const wasm = URL.createObjectURL(await download(new URL("wasm/wllama.wasm", library)));
    const engine = new Wllama({ default: wasm }, { logger });
    try {
        // A full cache of the sliding layers, as it would not be kept from prompt to prompt otherwise.
        await engine.loadModel([await download(model)], { n_ctx: context + 1, n_parallel: 1, swa_full: true });
        if (!engine.getLoadedContextInfo().success) throw new Error(`${model}: not a GGUF that llama.cpp reads`);
    } catch (error) {
        await engine.exit();
        throw error;
    } finally {
        URL.revokeObjectURL(wasm);
    }
    const threads = engine.isMultithread() ? engine.getNumThreads() : 1;
    let held = { count: 0, text: "" };

    const complete = async (ids, text, count) => {
        const found = [];
        const clock = []; // the engine's own, in seconds from the first new token
        const started = now();
        let over;
        let usage;
        await engine.createCompletion({
            prompt: held.text + text,
            max_tokens: count,
            samplers: ["top_k"],
            top_k: 1,
            ignore_eos: true, // runs go on past the end of the text
            cache_prompt: Boolean(held.count),
            logprobs: 1, // among which are the ids
            post_sampling_probs: true, // of the one that is left, not of all
            timings_per_token: true, // tokens come one late, and the last two together
            stream: true,
            onData({ choices: [{ logprobs }], timings, usage: last }) {
                usage ??= last;
                if (!logprobs) return;
                over = now();
                found.push(logprobs.content[0].id);
                clock.push(timings.predicted_ms / 1000);
            },
        });
        const expected = held.count + ids.length;
        if (usage.prompt_tokens !== expected) throw new Error(`it makes ${usage.prompt_tokens} tokens of a prompt of ${expected}`);
        if (found.length !== count) throw new Error(`it gives ${found.length} tokens of ${count}`);
        const times = [started, ...clock.map((time) => over - clock.at(-1) + time)];
        return { cached: usage.prompt_tokens_details.cached_tokens, ids: found, seconds: between(times) };
    };

    return {
        versions: { wllama: `llama.cpp ${Wllama.getLibllamaVersion()} on ${device}, threads: ${threads}` },
        async fill(ids, text) {
            held = { count: 0, text: "" };
            if (ids.length) await complete(ids, text, 1);
            held = { count: ids.length, text };
        },
        run: (ids, text, decode) => complete(ids, text, decode + 1),
        close: () => engine.exit(),
    };
};

const KINDS = { "transformers.js": transformers, wllama };

export const openPeer = (kind, library, model, context) => {
    const absolute = (address) => new URL(address, location).href.replace(/\/$/, "");
    return KINDS[kind](absolute(library), absolute(model), context);
};

// Other engines in this worker, to take turns with ours on the same GPU. Each is the user's own: the address of its
// library, and that of a model in the form that it reads.
//
// openPeer(kind, library, model) is a promise of
//     versions            by package
//     fill(ids)           a promise: its cache holds `ids` and no more
//     run(ids, decode)    a promise of { cached, ids, seconds }: `decode` tokens after the first new one, greedily; seconds to
//                         the first, and from each to the next; `cached` counts the tokens that the cache held before
//     close()
const now = () => performance.now() / 1000;

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
        async run(ids, decode) {
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
            return { cached, ids: found, seconds: times.slice(1).map((time, n) => time - times[n]) };
        },
        async close() {
            await empty();
            await engine.dispose();
        },
    };
};

const KINDS = { "transformers.js": transformers };

export const openPeer = (kind, library, model) => {
    const absolute = (address) => new URL(address, location).href.replace(/\/$/, "");
    return KINDS[kind](absolute(library), absolute(model));
};

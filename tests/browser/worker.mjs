const python = import("./python.mjs");

onmessage = async ({ data: { id, call } }) => {
    try {
        postMessage({ id, result: await (await python).run(...call) });
    } catch (error) {
        postMessage({ id, error: error.message });
    }
};

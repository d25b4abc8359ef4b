// Pyodide with the package, and page.py, which answers what bench.js asks.
// Nothing is awaited at the top, where a message that came meanwhile would be lost.
const dropped = new Map(); // by address: files of the user's, who answer there as a server would
const plainFetch = fetch;
self.fetch = async (resource, options) => {
    const file = dropped.get(String(resource.url ?? resource));
    return file ? new Response(file) : plainFetch(resource, options);
};

const start = async () => {
    const site = await (await fetch("site.json")).json();
    const { loadPyodide } = await import(new URL(site.pyodide, location));
    const python = await loadPyodide({
        lockFileURL: new URL("../static/pyodide/pyodide-lock.json", location).href,
        packages: ["gemma-wgpu"],
    });
    python.FS.writeFile("page.py", await (await fetch("page.py")).text());
    const openPeer = async (...peer) => (await import("./peers.js")).openPeer(...peer);
    return python.pyimport("page").Page(JSON.stringify(site), openPeer);
};
const page = start();

onmessage = async ({ data: { id, question, argument, files, cancel } }) => {
    if (cancel) return (await page).cancel();
    if (files) return Object.entries(files).forEach(([address, file]) => dropped.set(address, file));
    const progress = (what, done, total) => postMessage({ id, progress: { what, done, total } });
    try {
        const answer = await (await page).answer(question, JSON.stringify(argument ?? null), progress);
        postMessage({ id, ...JSON.parse(answer), over: true });
    } catch (error) {
        postMessage({ id, error: error.message.trim().split("\n").at(-1), over: true });
    }
};

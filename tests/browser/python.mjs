// Pyodide with numpy, the package, and the tests that run inside.
import { loadPyodide } from "./pyodide/pyodide.mjs";

const pyodide = await loadPyodide();
await pyodide.loadPackage("numpy", { messageCallback: () => {} });
pyodide.unpackArchive(await (await fetch("sources.zip")).arrayBuffer(), "zip");

// What the last expression of `code` is. Where Python `canBlock`, it is entered so that JSPI can suspend it.
export const run = async (code, canBlock) => {
    const globals = pyodide.toPy({});
    try {
        return canBlock ? await pyodide.runPythonAsync(code, { globals }) : pyodide.runPython(code, { globals });
    } finally {
        globals.destroy();
    }
};

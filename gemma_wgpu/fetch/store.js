// This drives the browser's network and storage for browser_store.py. The value of the script is the function that
// opens the storage. Files lie in folders, one for each model: in the origin private file system, or in the Cache API if
// that is missing. If both are missing, in a private window for example, nothing is kept.
async () => {
    const NAME = "gemma_wgpu";

    const openFileSystem = async () => {
        if (!globalThis.FileSystemFileHandle?.prototype.createWritable) throw new Error("no files that can be written");
        const root = await (await navigator.storage.getDirectory()).getDirectoryHandle(NAME, { create: true });
        const folder = (name, create = false) => root.getDirectoryHandle(name, { create });
        return {
            get: async (home, name) => (await (await folder(home)).getFileHandle(name)).getFile(),
            // The data take the file's place when they are whole, so two pages may write the same file.
            async put(home, name, data) {
                const file = await (await folder(home, true)).getFileHandle(name, { create: true });
                const writable = await file.createWritable();
                await writable.write(data);
                await writable.close();
            },
            remove: async (home, name) => (await folder(home)).removeEntry(name),
            async list() {
                const found = [];
                for await (const [home, files] of root.entries()) {
                    for await (const [name, file] of files.entries()) {
                        found.push([home, name, (await file.getFile()).size]);
                    }
                }
                return found;
            },
        };
    };

    const openCache = async () => {
        const cache = await caches.open(NAME);
        const key = (home, name) => `https://models.invalid/${home}/${name}`;
        const size = (response) => Number(response.headers.get("Content-Length"));
        return {
            async get(home, name) {
                const response = await cache.match(key(home, name));
                if (!response) return undefined;
                return { size: size(response), arrayBuffer: () => response.arrayBuffer(), blob: () => response.blob() };
            },
            async put(home, name, data) {
                const headers = { "Content-Length": data.byteLength };
                await cache.put(key(home, name), new Response(data, { headers }));
            },
            remove: (home, name) => cache.delete(key(home, name)),
            async list() {
                const found = [];
                for (const request of await cache.keys()) {
                    const [, home, name] = new URL(request.url).pathname.split("/");
                    found.push([home, name, size(await cache.match(request))]);
                }
                return found;
            },
        };
    };

    const NOWHERE = {
        get: async () => undefined,
        put: async () => {
            throw new Error("this browser has no storage for it here");
        },
        remove: async () => undefined,
        list: async () => [],
    };

    const files = await openFileSystem().catch(openCache).catch(() => NOWHERE);
    const stopping = new AbortController();
    let problem; // says why something was not kept

    const seconds = { storage: 0, download: 0, hash: 0 }; // spent so far
    const timed = async (what, work) => {
        const started = performance.now();
        try {
            return await work();
        } finally {
            seconds[what] += (performance.now() - started) / 1000;
        }
    };

    // Returns the bytes of a file that is kept if `fit` accepts their number, and undefined if there are none.
    const kept = async (home, name, fit = () => true) => {
        try {
            const file = await files.get(home, name);
            return file && fit(file.size) ? new Uint8Array(await file.arrayBuffer()) : undefined;
        } catch {
            return undefined;
        }
    };

    const keep = async (home, name, data) => {
        try {
            await files.put(home, name, data);
        } catch (error) {
            problem = error.name === "QuotaExceededError" ? "the browser's storage is full" : error.message;
            await remove(home, name);
        }
    };

    const remove = (home, name) => files.remove(home, name).catch(() => undefined);

    // crypto.subtle exists wherever WebGPU does, since both are for secure contexts alone.
    const sha256 = async (data) => {
        const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
        return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    };

    class Interrupted extends Error {} // the network has failed, so another try may succeed

    const open = async (url, options) => {
        let response;
        try {
            response = await fetch(url, { signal: stopping.signal, ...options });
        } catch (error) {
            throw new Interrupted(
                `no answer (${error.message}); the server is out of reach, or does not let this site read it (CORS)`,
            );
        }
        if (response.ok) return response;
        const answer = `the server answers ${response.status} ${response.statusText}`.trim();
        if ([408, 429].includes(response.status) || response.status >= 500) throw new Interrupted(answer);
        throw new Error(`${answer}; check the address, and that all files are there`);
    };

    // Goes on with the file that `download` has the beginning of, until it is whole.
    const receive = async (url, download, report) => {
        const { data } = download;
        const headers = download.done ? { Range: `bytes=${download.done}-` } : {};
        const response = await open(url, { headers, cache: "no-store" });
        if (response.status !== 206) download.done = 0; // the server sends the whole file, whatever was asked for
        const reader = response.body.getReader();
        for (;;) {
            const { done, value } = await reader.read().catch((error) => {
                throw new Interrupted(error.message);
            });
            if (done) break;
            if (download.done + value.length > data.length) {
                throw new Error(`the server has more than the ${data.length} bytes that the manifest says`);
            }
            data.set(value, download.done);
            download.done += value.length;
            value.buffer.transfer(0); // frees it now, since the garbage collector is in no hurry
            report(download.done);
        }
        if (download.done < data.length) throw new Interrupted("the connection was closed");
    };

    const PAUSES = [1000, 2000, 4000]; // milliseconds before each new try
    const PROGRESS = 1 << 20; // bytes: a try that brings as many has not failed

    // Fetches a file, of which an earlier call may have kept the beginning.
    const fetchFile = async (home, name, url, nbytes, report) => {
        const begun = await kept(home, `${name}.part`, (size) => size < nbytes);
        const download = { data: new Uint8Array(nbytes), done: begun?.length ?? 0 };
        if (begun) download.data.set(begun);
        for (let furthest = download.done, tries = 0; ; ) {
            try {
                await receive(url, download, report);
                return download.data;
            } catch (error) {
                if (download.done >= furthest + PROGRESS) [furthest, tries] = [download.done, 0];
                if (error instanceof Interrupted && !stopping.signal.aborted && tries < PAUSES.length) {
                    await new Promise((resolve) => setTimeout(resolve, PAUSES[tries++]));
                    continue;
                }
                if (download.done) await keep(home, `${name}.part`, download.data.subarray(0, download.done));
                if (!(error instanceof Interrupted)) throw error;
                throw new Error(
                    `stopped at ${download.done} of ${nbytes} bytes: ${error.message}; load the model again, ` +
                        "it goes on from there",
                );
            }
        }
    };

    // Returns what `slices` reads from: a file that is kept, or else a copy of its data.
    const blob = async (home, name, data) => {
        const file = await files.get(home, name).catch(() => undefined);
        if (file?.size !== data.length) return new Blob([data]);
        return file.slice ? file : file.blob();
    };

    // Returns the bytes of spans, [offset, size, offset, size, ...], one after the other.
    const slices = async (file, spans) => {
        const parts = [];
        for (let i = 0; i < spans.length; i += 2) parts.push(file.slice(spans[i], spans[i] + spans[i + 1]));
        return new Uint8Array(await new Blob(parts).arrayBuffer());
    };

    return {
        remove,
        blob,
        slices,
        list: files.list,
        read: kept,
        keep,
        stop: () => stopping.abort(),
        problem: () => problem,
        seconds,

        // Returns a small file as it is now, or as it was kept if the server cannot be reached.
        async fetchSmall(home, name, url) {
            try {
                return new Uint8Array(await (await open(url, { cache: "no-cache" })).arrayBuffer());
            } catch (error) {
                const data = error instanceof Interrupted && (await kept(home, name));
                if (data) return data;
                throw error;
            }
        },

        // Returns the file with this SHA-256 as a Uint8Array.
        async load(home, name, url, nbytes, hash, report) {
            const there = await timed("storage", () => kept(home, name, (size) => size === nbytes));
            if (there && (await timed("hash", () => sha256(there))) === hash) {
                report(nbytes);
                return there;
            }
            for (let tries = 0; tries < 2; tries++) {
                const data = await timed("download", () => fetchFile(home, name, url, nbytes, report));
                const right = (await timed("hash", () => sha256(data))) === hash;
                if (right) await timed("storage", () => keep(home, name, data));
                await remove(home, `${name}.part`);
                if (right) return data;
            }
            throw new Error("its SHA-256 is not the one in the manifest, and was not when fetched again; tell its host");
        },
    };
};

// The page's face: forms, tables and plots. What is measured and what is in the tables comes from Python: see page.py.
const find = (selector, within = document) => within.querySelector(selector);
const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
        if (value !== undefined && value !== false) element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
};

// The worker, which is asked one question at a time.

const worker = new Worker("worker.js", { type: "module" });
const asked = new Map();
let last = 0;
worker.onmessage = ({ data: { id, over, answer, error, progress } }) => {
    const { resolve, reject, report } = asked.get(id);
    if (progress) return report?.(progress);
    if (!over) return undefined;
    asked.delete(id);
    return error === undefined ? resolve(answer) : reject(new Error(error)); // undefined where it was cancelled
};
worker.onerror = (event) => complain(event.message);

const ask = (question, argument, report) =>
    new Promise((resolve, reject) => {
        asked.set(++last, { resolve, reject, report });
        worker.postMessage({ id: last, question, argument });
    });

// What goes wrong, and what goes on.

const complain = (message) => {
    const trouble = find("#trouble");
    trouble.textContent = message;
    trouble.hidden = !message;
    if (message) trouble.scrollIntoView({ block: "nearest" });
};

const show = ({ what, done, total }) => {
    const megabytes = (bytes) => (bytes / 1e6).toFixed(0);
    const far = total > 1e6 ? `: ${megabytes(done)} of ${megabytes(total)} MB` : ` (${done} of ${total})`;
    find("#doing").textContent = what + (total ? far : "…");
    const bar = find("progress");
    if (!total) return bar.removeAttribute("value");
    bar.max = total;
    bar.value = done;
    return undefined;
};

// The answer to a question that takes a while, and can be cancelled; undefined where it was, or failed.
const watch = async (question, argument) => {
    complain("");
    const bar = find("progress");
    bar.removeAttribute("value");
    find("#doing").textContent = "beginning";
    find("#running").hidden = false;
    document.querySelectorAll("button.main").forEach((button) => (button.disabled = true));
    try {
        const answer = await ask(question, argument, show);
        if (answer === undefined) complain("Cancelled; the GPU’s memory is free again.");
        return answer;
    } catch (error) {
        complain(error.message);
        return undefined;
    } finally {
        find("#running").hidden = true;
        document.querySelectorAll("button.main").forEach((button) => (button.disabled = false));
    }
};

// Tables. Their roles are said, since on a phone they are no longer laid out as tables.

const table = ({ title, head, rows, void: wrong }, more = {}) => {
    const named = head.some(Boolean);
    const cells = (row) =>
        row.map((text, column) =>
            make(
                column || named ? "td" : "th",
                { role: column || named ? "cell" : "rowheader", "data-head": head[column], class: text ? undefined : "empty" },
                text,
            ),
        );
    const body = rows.map((row, n) => make("tr", { role: "row", class: wrong.includes(n) ? "void" : undefined }, ...cells(row)));
    const top = make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...head.map((text) => make("th", { role: "columnheader" }, text))));
    return make(
        "div",
        { class: "scroll", tabindex: 0, role: "group", "aria-label": title },
        make(
            "table",
            { role: "table", ...more },
            make("caption", {}, title),
            ...(named ? [top] : []),
            make("tbody", { role: "rowgroup" }, ...body),
        ),
    );
};

// Plots.

const plots = [];
const probe = document.body.appendChild(make("i", { hidden: true }));
const color = (name) => {
    probe.style.color = `var(${name})`;
    return getComputedStyle(probe).color; // of light-dark() the one that holds
};
const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

const plot = (title, height, type, data, options) => {
    const canvas = make("canvas", { role: "img", "aria-label": `${title}. The figures are in the tables.` });
    const figure = make("figure", {}, make("figcaption", {}, title), make("div", { style: `height: ${height}rem` }, canvas));
    find("#plots").append(figure);
    data.datasets.forEach((set, n) => {
        set.borderColor = color(`--series-${(n % 6) + 1}`);
        set.backgroundColor = set.borderColor;
    });
    const axes = Object.fromEntries(
        Object.entries(options.scales).map(([name, axis]) => [
            name,
            { ...axis, grid: { color: color("--line") }, ticks: { color: color("--quiet") }, title: { display: Boolean(axis.label), text: axis.label, color: color("--quiet") } },
        ]),
    );
    const legend = { display: data.datasets.length > 1, position: "bottom", labels: { color: color("--text"), boxWidth: 12 } };
    plots.push(
        new Chart(canvas, {
            type,
            data,
            options: {
                ...options,
                scales: axes,
                animation: false,
                maintainAspectRatio: false,
                plugins: { legend, tooltip: { callbacks: options.callbacks } },
            },
        }),
    );
};

const drawLines = ({ title, x, y, lines }) =>
    plot(
        title,
        16,
        "line",
        {
            datasets: Object.entries(lines).map(([label, points]) => ({
                label,
                data: points.map(([at, median, smallest, largest]) => ({ x: at, y: median, smallest, largest })),
            })),
        },
        {
            scales: { x: { type: "linear", label: x, grace: "5%" }, y: { beginAtZero: true, label: y } },
            callbacks: {
                title: ([{ parsed }]) => `${parsed.x.toLocaleString("en")} ${x}`,
                label: ({ dataset, raw }) =>
                    `${dataset.label}: ${number.format(raw.y)} (${number.format(raw.smallest)}–${number.format(raw.largest)})`,
            },
        },
    );

const drawBars = ({ title, x, names, sets }) =>
    plot(
        title,
        4 + 1.4 * names.length,
        "bar",
        { labels: names, datasets: Object.entries(sets).map(([label, data]) => ({ label, data })) },
        { indexAxis: "y", scales: { x: { beginAtZero: true, label: x }, y: {} } },
    );

// Results: reports as the JSON that Python wrote, and what it makes of them.

let reports = [];
let shown;

// The figures that most come for, of the report that came last.
const headline = (report) =>
    (report?.headline ?? []).map(({ figure, unit, what }) =>
        make("div", { class: report.valid ? undefined : "void" }, make("dt", {}, what), make("dd", {}, make("b", {}, figure), ` ${unit}`)),
    );

const draw = () => {
    plots.splice(0).forEach((chart) => chart.destroy());
    find("#plots").replaceChildren();
    shown?.panels.forEach(drawLines);
    shown?.bars.forEach(drawBars);
};

const present = async (texts) => {
    const next = texts.length ? JSON.parse(await ask("show", texts)) : undefined;
    [reports, shown] = [texts, next];
    find("#none").hidden = Boolean(shown);
    document.querySelectorAll(".needs-results").forEach((button) => (button.disabled = !shown));
    find("#card").replaceChildren(...(shown ? [table(shown.card, { class: "card" })] : []));
    const warnings = new Set(shown?.reports.flatMap((report) => report.warnings));
    find("#warnings").replaceChildren(
        ...[...warnings].map((text) => make("p", { class: text.startsWith("INVALID") ? "warning void" : "warning" }, text)),
    );
    find("#absent").textContent = shown?.absent.length ? `Not beside it: ${shown.absent.join(", ")}, absent from these reports.` : "";
    find("#headline").replaceChildren(...headline(shown?.reports.at(-1)));
    find("#reports").replaceChildren(
        ...(shown?.reports ?? []).map(({ title, tables, valid }, n) => {
            const remove = make("button", { type: "button", "aria-label": `Remove report ${n + 1}` }, "Remove");
            remove.onclick = () => present(reports.filter((_, other) => other !== n));
            const mark = valid ? [] : [make("strong", { class: "mark" }, "invalid")];
            return make(
                "details",
                {},
                make("summary", {}, `${n + 1}: `, ...mark, title),
                ...tables.map((one) => table(one)),
                make("p", { class: "actions" }, remove),
            );
        }),
    );
    draw();
};

const save = (text, type, ending) => {
    const address = URL.createObjectURL(new Blob([text], { type }));
    make("a", { href: address, download: `gemma-wgpu-bench.${ending}` }).click();
    URL.revokeObjectURL(address);
};

const open = async (files) => {
    complain("");
    for (const file of files) {
        try {
            const content = JSON.parse(await file.text());
            const found = (Array.isArray(content) ? content : [content]).map((report) => JSON.stringify(report));
            await present([...reports, ...found]);
        } catch (error) {
            complain(`${file.name}: ${error.message}`);
        }
    }
};

// Settings, which are in the address too.

const form = find("#settings");
const PEERS = ["transformers.js", "wllama"];
const files = find("#folder");

const fields = () => [...new FormData(form)].filter(([name, value]) => name && typeof value === "string");

const remember = () => {
    const parameters = new URLSearchParams(fields().filter(([, value]) => value));
    history.replaceState(null, "", `?${parameters}`);
};

const recall = () => {
    const parameters = new URLSearchParams(location.search);
    if (!parameters.size) return;
    for (const input of form.elements) {
        if (!input.name) continue;
        const values = parameters.getAll(input.name);
        if (input.type === "checkbox") input.checked = values.includes(input.value);
        else if (values.length) [input.value] = values;
    }
    find("#peers").open = PEERS.some((peer) => parameters.get(`${peer} library`));
};

const settings = () => {
    const data = new FormData(form);
    const text = (name) => data.get(name).trim();
    return {
        model: text("model"),
        precision: text("precision"),
        context: Number(text("context")) || null,
        cold: data.has("cold"),
        shapes: [...data.getAll("shape"), ...text("shapes").split(/[\s,]+/).filter(Boolean)],
        depths: text("depths"),
        repetitions: Number(text("repetitions")),
        peers: PEERS.map((kind) => ({ kind, library: text(`${kind} library`), model: text(`${kind} model`) })).filter(
            ({ library, model }) => library && model,
        ),
    };
};

form.addEventListener("input", remember);
form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const report = await watch("measure", settings());
    if (report === undefined) return;
    await present([...reports, report]);
    find("#results-title").scrollIntoView();
});

find("#kernel-settings").addEventListener("submit", async (event) => {
    event.preventDefault();
    const data = new FormData(event.target);
    const { model, precision } = Object.fromEntries(data);
    const answer = await watch("kernels", { model, precision, tokens: Number(data.get("tokens")) });
    if (answer === undefined) return;
    find("#kernel-results").replaceChildren(table(JSON.parse(answer).table));
});

// A folder of the user's: its files answer at an address of this page, as those of a server would.

const take = (chosen) => {
    const manifest = chosen.find(({ name }) => name === "manifest.json");
    if (!manifest) return complain("That folder has no manifest.json; drop one that gemma-wgpu convert made.");
    complain("");
    const name = manifest.webkitRelativePath.split("/").at(-2) || "model";
    const base = new URL(`dropped/${name}-${manifest.size}-${manifest.lastModified}`, location);
    worker.postMessage({ files: Object.fromEntries(chosen.map((file) => [`${base.origin}${base.pathname}/${file.name}`, file])) });
    form.elements.model.value = `./${base.pathname.split("/").slice(-2).join("/")}`;
    return remember();
};

const entriesOf = async (entry) => {
    if (entry.isFile) return [await new Promise((resolve, reject) => entry.file(resolve, reject))];
    const reader = entry.createReader();
    const found = [];
    for (;;) {
        const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
        if (!some.length) return (await Promise.all(found.map(entriesOf))).flat();
        found.push(...some);
    }
};

const drop = find("#drop");
files.onchange = () => take([...files.files]);
drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
});
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", async (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
    take((await Promise.all(entries.map(entriesOf))).flat());
});

// Buttons and tabs.

const ACTIONS = {
    cancel: () => worker.postMessage({ cancel: true }),
    clear: () => present([]),
    json: () => save(reports.length === 1 ? reports[0] : `[${reports.join(",\n")}]`, "application/json", "json"),
    csv: async () => save(await ask("csv", reports), "text/csv", "csv"),
    markdown: async () => save(await ask("markdown", reports), "text/markdown", "md"),
    link: async () => {
        remember();
        await navigator.clipboard.writeText(location.href);
    },
};
document.addEventListener("click", ({ target }) => ACTIONS[target.dataset?.does]?.()?.catch?.((error) => complain(error.message)));
find("#import").onchange = async ({ target }) => {
    await open([...target.files]);
    target.value = "";
};

const tabs = [...document.querySelectorAll("[role=tab]")];
const select = (chosen) =>
    tabs.forEach((tab) => {
        tab.setAttribute("aria-selected", tab === chosen);
        tab.tabIndex = tab === chosen ? 0 : -1;
        find(`#${tab.getAttribute("aria-controls")}`).hidden = tab !== chosen;
    });
tabs.forEach((tab, n) => {
    tab.onclick = () => select(tab);
    tab.onkeydown = ({ key }) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
        if (!step) return;
        const next = tabs[(n + step + tabs.length) % tabs.length];
        select(next);
        next.focus();
    };
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// What the site has, and which GPU this is.

const site = await (await fetch("site.json")).json();
find("#commit").textContent = site.commit;
find("#models").append(...site.models.map((address) => make("option", { value: address })));
form.elements.model.value = site.models[0] ?? "";
recall();
await present([]);
try {
    const { name, cpu, facts, half, kernels } = JSON.parse(await ask("adapter"));
    const adapter = find("#adapter");
    adapter.textContent = name;
    if (cpu) adapter.append(make("strong", { class: "mark" }, "no GPU: this is the CPU standing in for one"));
    find("#gpu dl").append(...Object.entries(facts).flatMap(([key, value]) => [make("dt", {}, key), make("dd", {}, value || "–")]));
    find("#gpu details").hidden = false;
    find("option[value=f16]", form).disabled = !half;
    find("#kernel-settings select").append(...kernels.map((model) => make("option", {}, model)));
} catch (error) {
    find("#adapter").textContent = "No GPU";
    complain(error.message);
}
document.body.dataset.ready = true;

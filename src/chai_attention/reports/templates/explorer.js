// Heads of a layer side by side, by cluster. Data: see redundancy_files.Prompt.
(() => {
  const RAMPS = {
    light: [[255, 255, 255], [96, 160, 222], [4, 32, 84]],
    dark: [[20, 23, 28], [38, 104, 178], [226, 240, 255]],
  };

  const isDark = () => getComputedStyle(document.documentElement).colorScheme === "dark";
  let printing = false;  // paper is white whatever the theme
  const ramp = () => RAMPS[isDark() && !printing ? "dark" : "light"];
  const paint = (pixels, at, share, colors) => {
    const place = 2 * share, stop = place < 1 ? 0 : 1;
    for (let i = 0; i < 3; i++) pixels[at + i] = colors[stop][i] + (place - stop) * (colors[stop + 1][i] - colors[stop][i]);
    pixels[at + 3] = 255;
  };
  const make = (name, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  };

  function bytesOf(text) {
    const raw = atob(text);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
    return bytes;
  }

  function explore(root, data) {
    const part = (name) => root.querySelector(`[data-role="${name}"]`);
    const layer = part("layer"), prompt = part("prompt"), from = part("from");
    let maps = null;    // bytes of the chosen layer and prompt
    let chosen = null;  // head whose map is read
    let place = null;   // [query cell, key cell]

    const cellsOf = (text) => Math.ceil(text.tokens.length / text.block);
    const byteOf = (head, row, column, cells) => maps[head * cells * (cells + 1) / 2 + row * (row + 1) / 2 + column];

    function draw(canvas, head, cells, cross) {
      canvas.width = canvas.height = cells;
      const context = canvas.getContext("2d"), image = context.createImageData(cells, cells), colors = ramp();
      for (let row = 0; row < cells; row++)
        for (let column = 0; column <= row; column++)
          paint(image.data, 4 * (row * cells + column), byteOf(head, row, column, cells) / 255, colors);
      if (cross) {
        const at = 4 * (cross[0] * cells + cross[1]);
        [255, 90, 0, 255].forEach((value, i) => { image.data[at + i] = value; });
      }
      context.putImageData(image, 0, 0);
    }

    function members(text) {
      const stage = from.selectedIndex, profile = profileOf(text);
      if (profile) return profile.representatives[layer.selectedIndex];
      return stage < text.lengths.length
        ? text.representatives[layer.selectedIndex][stage]
        : data.layers[layer.selectedIndex].representatives;
    }

    // behind the stages of a text and "all requests"
    const profileOf = (text) => data.profiles[from.selectedIndex - text.lengths.length - 1];
    const forgetful = (text) => {
      const profile = profileOf(text);
      return profile ? profile.streaming[layer.selectedIndex] : [];
    };

    function groups(representatives, forgets) {
      const found = new Map();
      representatives.forEach((rep, head) => {
        if (!forgets.includes(head)) found.set(rep, [...(found.get(rep) || []), head]);
      });
      // the largest first, its representative in front
      return [...found].map(([rep, heads]) => [rep, [rep, ...heads.filter((head) => head !== rep)]])
        .sort((a, b) => b[1].length - a[1].length || a[0] - b[0]);
    }

    function show() {
      const text = data.prompts[prompt.selectedIndex], cells = cellsOf(text);
      const info = data.layers[layer.selectedIndex];
      maps = bytesOf(text.maps[layer.selectedIndex]);
      const representatives = members(text), forgets = forgetful(text);
      const clusters = groups(representatives, forgets);
      const pooled = text.block > 1 ? `, ${text.block} tokens per cell` : "";
      const shares = data.heads - clusters.length - forgets.length;
      const kinds = profileOf(text)
        ? `${clusters.length} of ${data.heads} heads keep their far keys, ${shares} share, ${forgets.length} forget`
        : `${data.heads} heads in ${clusters.length} clusters`;
      part("summary").textContent = `Layer ${info.layer}: ${kinds}; ${text.tokens.length} tokens${pooled}.`;
      const map = (head, rep) => {
        const canvas = make("canvas");
        draw(canvas, head, cells);
        const like = info.correlation[rep][head].toFixed(2), forget = forgets.includes(head);
        const name = forget || head !== rep
          ? make("span", { textContent: forget ? `head ${head}` : `head ${head}, r ${like}` })
          : make("span", { className: "rep", textContent: `★ head ${head}` });
        const button = make("button", { type: "button", className: "map" }, canvas, name);
        const role = head === rep ? "the representative" : `correlation with head ${rep} ${like}`;
        button.setAttribute("aria-label", `Head ${head}, ${forget ? "forgets its far keys" : role}: read its map`);
        button.dataset.head = head;
        button.addEventListener("click", () => { chosen = chosen === head ? null : head; read(true); });
        return button;
      };
      const box = (title, maps) => make("section", { className: "cluster" },
        make("h4", { textContent: title }), make("div", { className: "maps" }, ...maps));
      const boxes = clusters.map(([rep, heads]) =>
        box(heads.length === 1 ? `Head ${rep} alone` : `${heads.length} heads use head ${rep}`, heads.map((head) => map(head, rep))));
      if (forgets.length) {
        const title = forgets.length === 1 ? "1 head forgets its far keys" : `${forgets.length} heads forget their far keys`;
        boxes.push(box(title, forgets.map((head) => map(head, head))));
      }
      part("clusters").replaceChildren(...boxes);
      read(false);
      matrix(info, [...clusters.flatMap(([, heads]) => heads), ...forgets], representatives);
    }

    function read(scroll) {
      const text = data.prompts[prompt.selectedIndex], cells = cellsOf(text), box = part("reading");
      root.querySelectorAll(".map").forEach((button) => button.setAttribute("aria-pressed", String(Number(button.dataset.head) === chosen)));
      box.hidden = chosen === null;
      if (chosen === null) return;
      const rep = members(text)[chosen];
      const heads = rep === chosen ? [chosen] : [chosen, rep];
      place = place && Math.max(...place) < cells ? place : [cells - 1, 0];
      const clamp = (value, high) => Math.min(high, Math.max(0, value));
      const move = (row, column) => {
        const query = clamp(row, cells - 1);
        place = [query, clamp(column, query)];
        report();
      };
      const canvases = heads.map((head) => {
        const canvas = make("canvas", { tabIndex: 0 });
        canvas.dataset.head = head;
        canvas.setAttribute("role", "application");
        canvas.setAttribute("aria-label", `Map of head ${head}; arrow keys move the cell that is read`);
        const point = (event) => {
          const area = canvas.getBoundingClientRect();
          move(Math.floor((event.clientY - area.top) / area.height * cells), Math.floor((event.clientX - area.left) / area.width * cells));
        };
        canvas.addEventListener("pointerdown", point);
        canvas.addEventListener("pointermove", (event) => { if (event.pointerType === "mouse") point(event); });
        canvas.addEventListener("keydown", (event) => {
          const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
          if (!step) return;
          event.preventDefault();
          move(place[0] + step[0], place[1] + step[1]);
        });
        return canvas;
      });
      const words = (cell) => text.tokens.slice(cell * text.block, (cell + 1) * text.block).join("");
      function report() {
        canvases.forEach((canvas, i) => draw(canvas, heads[i], cells, place));
        const [row, column] = place;
        const shares = heads.map((head) => `head ${head}: ${(100 * (byteOf(head, row, column, cells) / 255) ** 2).toFixed(1)}%`);
        part("cell").replaceChildren("From ", make("b", { textContent: JSON.stringify(words(row)) }), " to ",
          make("b", { textContent: JSON.stringify(words(column)) }), `: ${shares.join(", ")}`);
      }
      part("pair").replaceChildren(...canvases.map((canvas, i) =>
        make("figure", {}, make("figcaption", { textContent: `Head ${heads[i]}${forgetful(text).includes(heads[i]) ? ", which forgets its far keys" : heads[i] === rep ? ", the representative" : ""}` }), canvas)));
      report();
      if (scroll) box.scrollIntoView({ block: "nearest" });
    }

    function matrix(info, order, representatives) {
      const canvas = part("matrix"), size = order.length, colors = ramp();
      canvas.width = canvas.height = size;
      const context = canvas.getContext("2d"), image = context.createImageData(size, size);
      let inside = [0, 0], across = [0, 0];
      order.forEach((first, row) => order.forEach((second, column) => {
        const value = info.correlation[first][second];
        paint(image.data, 4 * (row * size + column), Math.max(0, value), colors);
        if (row >= column) return;
        const sum = representatives[first] === representatives[second] ? inside : across;
        sum[0] += value;
        sum[1] += 1;
      }));
      context.putImageData(image, 0, 0);
      const mean = ([sum, count]) => (count ? (sum / count).toFixed(2) : "none");
      const text = `Mean correlation of two heads of one cluster: ${mean(inside)}; of two clusters: ${mean(across)}. The diagonal is 1; 0 or less has the colour of the page.`;
      part("matrix-text").textContent = text;
      canvas.setAttribute("aria-label", text);
    }

    function stages() {
      const text = data.prompts[prompt.selectedIndex], last = text.lengths.length - 1, kept = from.value;
      const names = text.lengths.map((n, i) => (i === last ? `the whole text (${n} tokens)` : `its first ${n} tokens`));
      from.replaceChildren(...[...names, "all requests (static)", ...data.profiles.map((one) => one.name)].map((name) => make("option", { textContent: name })));
      from.value = kept;
      if (from.selectedIndex < 0) from.selectedIndex = last;
    }

    layer.append(...data.layers.map((info) => make("option", { textContent: String(info.layer) })));
    prompt.append(...data.prompts.map((text) => make("option", { textContent: text.name })));
    stages();
    layer.addEventListener("change", show);
    from.addEventListener("change", show);
    prompt.addEventListener("change", () => { place = null; stages(); show(); });
    document.addEventListener("themechange", show);
    addEventListener("beforeprint", () => { printing = true; show(); });
    addEventListener("afterprint", () => { printing = false; show(); });
    root.hidden = false;
    show();
  }

  document.querySelectorAll(".explorer").forEach((root) =>
    explore(root, JSON.parse(document.getElementById(`${root.id}-data`).textContent)));
})();

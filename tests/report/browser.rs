//! A headless Chromium, spoken to in the DevTools protocol over two pipes: JSON that ends in NUL.
//!
//! What a page does while it is open (requests, messages of the console) is collected from the
//! moment that it is asked for. The browser is `chromium` in PATH, or ISOBATH_CHROMIUM. Without
//! one, tests say "skipped"; with ISOBATH_REQUIRE_CHROMIUM=1 they fail.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Nothing that the tests ask for takes this long.
const PATIENCE: Duration = Duration::from_secs(60);

const FLAGS: [&str; 11] = [
    "--headless",
    "--no-sandbox", // for root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
];

pub struct Browser {
    process: Child,
    requests: ChildStdin,
    answers: Receiver<Value>,
    asked: u64,
    /// The tab that is open, and what it reported so far.
    session: Option<String>,
    events: Vec<Value>,
    _profile: TempDir,
}

/// A screen and its owner's taste.
#[derive(Clone, Copy, Debug)]
pub struct Screen {
    pub width: u32,
    /// "light" or "dark"
    pub scheme: &'static str,
}

/// Pixels in rows from the top, red, green, blue.
pub struct Picture {
    pub width: usize,
    pub pixels: Vec<[u8; 3]>,
}

impl Browser {
    /// `None` where there is no Chromium; prints the reason.
    pub fn start() -> Option<Self> {
        let program = env::var_os("ISOBATH_CHROMIUM").unwrap_or("chromium".into());
        if let Err(error) = Command::new(&program).arg("--version").output() {
            let why = format!("no Chromium: {}: {error}", program.display());
            assert!(env::var_os("ISOBATH_REQUIRE_CHROMIUM").is_none(), "{why}");
            println!("skipped: {why}");
            return None;
        }
        let profile = tempfile::tempdir().unwrap();
        // Chromium reads from descriptor 3 and writes to 4.
        let mut process = Command::new("sh")
            .args(["-c", r#"exec "$@" 3<&0 4>&1 0</dev/null 1>/dev/null 2>/dev/null"#, "sh"])
            .arg(program)
            .args(FLAGS)
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let requests = process.stdin.take().unwrap();
        let mut pipe = BufReader::new(process.stdout.take().unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while pipe.read_until(0, &mut message).is_ok_and(|count| count > 1) {
                message.pop();
                if sender.send(serde_json::from_slice(&message).unwrap()).is_err() {
                    return;
                }
                message.clear();
            }
        });
        let (session, events, asked) = (None, Vec::new(), 0);
        Some(Browser { process, requests, answers, asked, session, events, _profile: profile })
    }

    /// Opens a page in a new tab on this screen and returns when it is loaded.
    pub fn open(&mut self, url: &str, screen: Screen) {
        self.session = None;
        let target = self.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attach = json!({ "targetId": target["targetId"], "flatten": true });
        let session = self.call("Target.attachToTarget", attach);
        self.session = session["sessionId"].as_str().map(str::to_string);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            self.call(&format!("{domain}.enable"), json!({}));
        }
        let Screen { width, scheme } = screen;
        let metrics = json!({
            "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600
        });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
        self.events.clear();
        self.call("Page.navigate", json!({ "url": url }));
        while !self.events.iter().any(|event| event["method"] == "Page.loadEventFired") {
            let event = self.receive();
            self.events.push(event);
        }
    }

    /// The value of a JavaScript expression in the page.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let request =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.call("Runtime.evaluate", request);
        assert!(answer.get("exceptionDetails").is_none(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// The whole page, also what lies below the screen.
    pub fn picture(&mut self) -> Picture {
        let size = self.evaluate(
            "[document.documentElement.clientWidth, document.documentElement.scrollHeight]",
        );
        let clip = json!({ "x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1 });
        let request = json!({ "format": "png", "captureBeyondViewport": true, "clip": clip });
        let answer = self.call("Page.captureScreenshot", request);
        let file = BASE64_STANDARD.decode(answer["data"].as_str().unwrap()).unwrap();
        if let Some(folder) = env::var_os("ISOBATH_SCREENSHOTS") {
            let name = format!("{}-{}.png", size[0], self.asked);
            std::fs::write(std::path::Path::new(&folder).join(name), &file).unwrap();
        }
        Picture::decode(&file)
    }

    /// What the page has asked the network for.
    pub fn requests(&self) -> Vec<String> {
        let sent = self.events.iter().filter(|e| e["method"] == "Network.requestWillBeSent");
        sent.map(|e| e["params"]["request"]["url"].as_str().unwrap().to_string()).collect()
    }

    /// What the console has been told: errors, warnings and everything else.
    pub fn console(&self) -> Vec<String> {
        let kinds = ["Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"];
        let told = |event: &&Value| kinds.iter().any(|kind| event["method"] == *kind);
        self.events.iter().filter(told).map(|event| event["params"].to_string()).collect()
    }

    fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.asked += 1;
        let mut request = json!({ "id": self.asked, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            request["sessionId"] = session.as_str().into();
        }
        self.requests.write_all(format!("{request}\0").as_bytes()).unwrap();
        loop {
            let mut message = self.receive();
            if message["id"] != self.asked {
                self.events.push(message);
                continue;
            }
            assert!(message.get("error").is_none(), "{method}: {message}");
            return message["result"].take();
        }
    }

    fn receive(&self) -> Value {
        self.answers.recv_timeout(PATIENCE).expect("Chromium answers")
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Picture {
    fn decode(png: &[u8]) -> Self {
        let mut decoder = png::Decoder::new(std::io::Cursor::new(png));
        decoder.set_transformations(png::Transformations::normalize_to_color8());
        let mut reader = decoder.read_info().unwrap();
        let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut bytes).unwrap();
        let samples = info.color_type.samples();
        assert!(samples >= 3, "{:?}", info.color_type);
        let pixels = bytes[..info.buffer_size()].chunks_exact(samples);
        let pixels = pixels.map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect();
        Picture { width: info.width as usize, pixels }
    }

    /// Pixels of about this colour, `#rrggbb`, in a rectangle [left, top, width, height].
    pub fn count(&self, rectangle: [f64; 4], colour: &str) -> usize {
        let wanted = [1, 3, 5].map(|i| u8::from_str_radix(&colour[i..i + 2], 16).unwrap());
        let [left, top, width, height] = rectangle.map(|length| length.max(0.0) as usize);
        let rows = self.pixels.chunks_exact(self.width).skip(top).take(height);
        let pixels = rows.flat_map(|row| row.iter().skip(left).take(width));
        let near = |pixel: &&[u8; 3]| pixel.iter().zip(wanted).all(|(a, b)| a.abs_diff(b) <= 6);
        pixels.filter(near).count()
    }
}

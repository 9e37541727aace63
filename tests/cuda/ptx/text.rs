//! PTX as text, taken apart: kernels, their variables, and statements with operands that are
//! resolved.
//!
//! Reads what nvcc writes, which is less than the language. Knows nothing of what an instruction
//! does; anything else that it does not know is an error that names the line.

use std::collections::BTreeMap;

pub struct Kernel {
    pub name: String,
    pub parameters: Vec<Variable>,
    /// Of a block, as its launch bounds say.
    pub max_threads: u32,
    /// Bits of each register of a thread; a predicate has 1.
    pub registers: Vec<u32>,
    /// In static shared memory.
    pub shared: Vec<Variable>,
    pub statements: Vec<Statement>,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Variable {
    pub name: String,
    /// 0: shared memory whose size the launch gives.
    pub bytes: u32,
    pub alignment: u32,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Statement {
    /// Runs only in threads where this register is true, or false if negated.
    pub guard: Option<Guard>,
    pub opcode: String,
    pub operands: Vec<Operand>,
    /// "kernels/norm.cu:31 in kernels/norm.cu:80"
    pub place: String,
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Guard {
    pub register: u32,
    pub negated: bool,
}

#[derive(Clone, PartialEq, Debug)]
pub enum Operand {
    Register(u32),
    /// Bits, sign-extended.
    Integer(i64),
    Float(f32),
    Double(f64),
    /// A variable, by name.
    Variable(String),
    /// "%tid.x"
    Special(String),
    /// A statement, by its place in the kernel.
    Target(usize),
    /// `[base+offset]`
    Address(Box<Operand>, i64),
    /// `[map, {coordinates}]`
    Tensor(Box<Operand>, Vec<Operand>),
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `a|p`
    Pair(Box<Operand>, Box<Operand>),
    /// `_`
    Nothing,
}

/// All kernels of a file. Errors name the line.
pub fn kernels(text: &str) -> Result<Vec<Kernel>, String> {
    let files = files(text);
    let mut module_shared = vec![];
    let mut kernels = vec![];
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        let line = without_comment(line).trim();
        if let Some(name) = line.strip_prefix(".visible .entry ") {
            let name = name.trim_end_matches(['(', ')']).to_string();
            let mut head = String::new();
            if !line.ends_with(')') {
                for (_, line) in lines.by_ref() {
                    let line = without_comment(line).trim();
                    if line == ")" {
                        break;
                    }
                    head.push_str(line);
                }
            }
            let mut max_threads = 1024;
            for (_, line) in lines.by_ref() {
                let line = without_comment(line).trim();
                if line == "{" {
                    break;
                }
                if let Some(bound) = line.strip_prefix(".maxntid ") {
                    let extents = bound.split(',').map(|it| it.trim().parse::<u32>());
                    let extents: Result<Vec<u32>, _> = extents.collect();
                    max_threads = extents.map_err(|_| wrong(number, line))?.iter().product();
                }
            }
            let mut body = String::new();
            let (mut depth, start) = (1, number);
            for (_, line) in lines.by_ref() {
                let line = without_comment(line);
                depth += line.matches('{').count();
                depth -= line.matches('}').count();
                if depth == 0 {
                    break;
                }
                body.push_str(line);
                body.push('\n');
            }
            let parameters = head
                .split(',')
                .filter(|text| !text.is_empty())
                .map(|text| variable(text).ok_or_else(|| wrong(number, text)))
                .collect::<Result<Vec<_>, _>>()?;
            let body = Body::read(&body, &files)
                .map_err(|why| format!("kernel {name} (line {start}): {why}"))?;
            let kernel = Kernel {
                name,
                parameters,
                max_threads,
                registers: body.registers,
                shared: body.shared,
                statements: body.statements,
            };
            kernels.push(kernel);
        } else if line.starts_with(".shared") || line.starts_with(".extern .shared") {
            module_shared.push(variable(line).ok_or_else(|| wrong(number, line))?);
        }
    }
    for kernel in &mut kernels {
        let used: Vec<&str> = kernel.statements.iter().flat_map(|it| it.variables()).collect();
        let of_module = module_shared.iter().filter(|it| used.contains(&it.name.as_str()));
        kernel.shared.extend(of_module.cloned().collect::<Vec<_>>());
    }
    Ok(kernels)
}

fn wrong(number: usize, line: &str) -> String {
    format!("line {}: cannot read `{}`", number + 1, line.trim())
}

fn without_comment(line: &str) -> &str {
    line.split_once("//").map_or(line, |(code, _)| code)
}

/// `.file 1 "kernels/norm.cu"`, which stand at the end.
fn files(text: &str) -> BTreeMap<u32, String> {
    let mut files = BTreeMap::new();
    for line in text.lines().filter(|line| line.trim_start().starts_with(".file")) {
        let mut words = line.split_whitespace().skip(1);
        if let (Some(Ok(number)), Some(path)) = (words.next().map(str::parse), words.next()) {
            let path = path.trim_matches(['"', ',']);
            let short = path.rsplit_once("kernels/").map_or(path, |(_, file)| file);
            files.insert(number, short.to_string());
        }
    }
    files
}

/// `.param .align 64 .b8 name[128]`, `.shared .align 4 .u32 name`, `.extern .shared .. name[]`.
fn variable(text: &str) -> Option<Variable> {
    let text = text.trim().trim_end_matches(';');
    let (mut element, mut alignment) = (0, 0);
    let mut words = text.split_whitespace().peekable();
    let mut name = None;
    while let Some(word) = words.next() {
        match word {
            ".align" => alignment = words.next()?.parse().ok()?,
            ".param" | ".shared" | ".extern" | ".local" => {}
            _ if word.starts_with('.') => {
                element = word.trim_start_matches(|it: char| !it.is_ascii_digit()).parse().ok()?;
                element /= 8;
            }
            _ => name = Some(word),
        }
    }
    let name = name?;
    let (name, count) = match name.split_once('[') {
        Some((name, "]")) => (name, 0),
        Some((name, count)) => (name, count.trim_end_matches(']').parse().ok()?),
        None => (name, 1),
    };
    let alignment = if alignment == 0 { element } else { alignment };
    Some(Variable { name: name.to_string(), bytes: element * count, alignment })
}

impl Operand {
    /// Adds the registers in it.
    pub fn registers(&self, to: &mut Vec<u32>) {
        match self {
            Operand::Register(register) => to.push(*register),
            Operand::Address(base, _) => base.registers(to),
            Operand::Tensor(map, coordinates) => {
                map.registers(to);
                coordinates.iter().for_each(|it| it.registers(to));
            }
            Operand::Vector(all) => all.iter().for_each(|it| it.registers(to)),
            Operand::Pair(value, predicate) => {
                value.registers(to);
                predicate.registers(to);
            }
            _ => {}
        }
    }
}

impl Statement {
    fn variables(&self) -> Vec<&str> {
        fn of(operand: &Operand) -> Option<&str> {
            match operand {
                Operand::Variable(name) => Some(name),
                Operand::Address(base, _) => of(base),
                _ => None,
            }
        }
        self.operands.iter().filter_map(of).collect()
    }
}

/// A kernel's body.
#[derive(Default)]
struct Body {
    registers: Vec<u32>,
    shared: Vec<Variable>,
    statements: Vec<Statement>,
    /// Of the blocks that are open, the innermost last: a name, or what is before a number,
    /// and the first register.
    scopes: Vec<BTreeMap<String, (u32, u32)>>,
    labels: BTreeMap<String, usize>,
}

impl Body {
    fn read(text: &str, files: &BTreeMap<u32, String>) -> Result<Body, String> {
        let mut body = Body { scopes: vec![BTreeMap::new()], ..Body::default() };
        let mut place = String::new();
        let mut rest = text.trim_start();
        while let Some(first) = rest.chars().next() {
            rest = if first == '{' {
                body.scopes.push(BTreeMap::new());
                &rest[1..]
            } else if first == '}' {
                body.scopes.pop();
                &rest[1..]
            } else if rest.starts_with(".loc") {
                let (line, behind) = rest.split_once('\n').unwrap_or((rest, ""));
                place = place_of(line, files);
                behind
            } else if let Some((label, behind)) = label(rest) {
                if body.labels.insert(label.to_string(), body.statements.len()).is_some() {
                    return Err(format!("label {label} stands twice"));
                }
                behind
            } else {
                let (statement, behind) =
                    rest.split_once(';').ok_or_else(|| format!("no `;` after `{rest}`"))?;
                body.statement(statement.trim(), &place)
                    .map_err(|why| format!("`{}`: {why}", statement.trim()))?;
                behind
            }
            .trim_start();
        }
        let labels = std::mem::take(&mut body.labels);
        for statement in &mut body.statements {
            for operand in &mut statement.operands {
                if let Operand::Variable(name) = operand
                    && let Some(&target) = labels.get(name)
                {
                    *operand = Operand::Target(target);
                }
            }
        }
        Ok(body)
    }

    fn statement(&mut self, text: &str, place: &str) -> Result<(), String> {
        if let Some(declared) = text.strip_prefix(".reg") {
            return self.declare(declared);
        }
        if text.starts_with(".shared") {
            self.shared.push(variable(text).ok_or("not a variable")?);
            return Ok(());
        }
        if text.starts_with(".pragma") {
            return Ok(());
        }
        if text.starts_with('.') {
            return Err("a directive that is not known here".to_string());
        }
        let (guard, text) = match text.strip_prefix('@') {
            None => (None, text),
            Some(guarded) => {
                let (name, text) = guarded.split_once(char::is_whitespace).ok_or("no opcode")?;
                let register = self.register(name.trim_start_matches('!'));
                let register = register.ok_or("no such predicate")?;
                (Some(Guard { register, negated: name.starts_with('!') }), text.trim())
            }
        };
        let (opcode, operands) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        let operands = split(operands)
            .into_iter()
            .map(|operand| self.operand(operand))
            .collect::<Result<Vec<_>, _>>()?;
        let (opcode, place) = (opcode.to_string(), place.to_string());
        self.statements.push(Statement { guard, opcode, operands, place });
        Ok(())
    }

    /// ` .f32 %f<780>`, ` .pred p`
    fn declare(&mut self, text: &str) -> Result<(), String> {
        let (kind, names) = text.trim().split_once(char::is_whitespace).ok_or("no name")?;
        let bits = kind.trim_start_matches(|it: char| !it.is_ascii_digit());
        let bits = if kind == ".pred" { 1 } else { bits.parse().map_err(|_| "no width")? };
        for name in names.split(',').map(str::trim) {
            let (name, count) = match name.split_once('<') {
                Some((name, count)) => {
                    (name, count.trim_end_matches('>').parse().map_err(|_| "no count")?)
                }
                None => (name, 1),
            };
            let scope = self.scopes.last_mut().ok_or("outside of a block")?;
            let first = self.registers.len();
            scope.insert(name.to_string(), (first as u32, count));
            self.registers.resize(first + count as usize, bits);
        }
        Ok(())
    }

    fn register(&self, name: &str) -> Option<u32> {
        let prefix = name.trim_end_matches(|it: char| it.is_ascii_digit());
        let number: Option<u32> = name[prefix.len()..].parse().ok();
        for scope in self.scopes.iter().rev() {
            if let Some(&(first, 1)) = scope.get(name) {
                return Some(first);
            }
            if let (Some(&(first, count)), Some(number)) = (scope.get(prefix), number)
                && number < count
            {
                return Some(first + number);
            }
        }
        None
    }

    fn operand(&self, text: &str) -> Result<Operand, String> {
        let text = text.trim();
        let list = |text: &str| -> Result<Vec<Operand>, String> {
            split(text).into_iter().map(|operand| self.operand(operand)).collect()
        };
        if text == "_" {
            return Ok(Operand::Nothing);
        }
        if let Some(inner) = text.strip_prefix('[').and_then(|it| it.strip_suffix(']')) {
            if let Some((map, coordinates)) = inner.split_once(',') {
                let coordinates = coordinates.trim().trim_matches(['{', '}']);
                return Ok(Operand::Tensor(Box::new(self.operand(map)?), list(coordinates)?));
            }
            let (base, offset) = match inner.split_once('+') {
                Some((base, offset)) => (base, offset.trim().parse().map_err(|_| "no offset")?),
                None => (inner, 0),
            };
            return Ok(Operand::Address(Box::new(self.operand(base)?), offset));
        }
        if let Some(inner) = text.strip_prefix('{').and_then(|it| it.strip_suffix('}')) {
            return Ok(Operand::Vector(list(inner)?));
        }
        if let Some((value, predicate)) = text.split_once('|') {
            let (value, predicate) = (self.operand(value)?, self.operand(predicate)?);
            return Ok(Operand::Pair(Box::new(value), Box::new(predicate)));
        }
        if let Some(register) = self.register(text) {
            return Ok(Operand::Register(register));
        }
        if text.starts_with('%') {
            return Ok(Operand::Special(text.to_string()));
        }
        if let Some(bits) = text.strip_prefix("0f") {
            let bits = u32::from_str_radix(bits, 16).map_err(|_| format!("`{text}`"))?;
            return Ok(Operand::Float(f32::from_bits(bits)));
        }
        if let Some(bits) = text.strip_prefix("0d") {
            let bits = u64::from_str_radix(bits, 16).map_err(|_| format!("`{text}`"))?;
            return Ok(Operand::Double(f64::from_bits(bits)));
        }
        if text.starts_with(|it: char| it.is_ascii_digit() || it == '-') {
            let (sign, digits) = text.strip_prefix('-').map_or((1, text), |digits| (-1, digits));
            let value = match digits.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits.trim_end_matches('U'), 16),
                None => digits.trim_end_matches('U').parse(),
            };
            let value = value.map_err(|_| format!("`{text}`"))? as i64;
            return Ok(Operand::Integer(value.wrapping_mul(sign)));
        }
        if text.is_empty() || text.starts_with('!') {
            return Err(format!("operand `{text}`"));
        }
        Ok(Operand::Variable(text.to_string()))
    }
}

/// The label that a text begins with, as `$L__BB0_3:` does, and what comes after the colon.
fn label(text: &str) -> Option<(&str, &str)> {
    let end = text.find(|it: char| !(it.is_alphanumeric() || it == '_' || it == '$'))?;
    let behind = text[end..].strip_prefix(':')?;
    (!behind.starts_with(':')).then_some((&text[..end], behind))
}

/// At the commas that are in no bracket.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (vec![], 0, 0);
    for (at, character) in text.char_indices() {
        match character {
            '[' | '{' => depth += 1,
            ']' | '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if !text[start..].trim().is_empty() {
        parts.push(&text[start..]);
    }
    parts
}

/// `.loc 2 176 3, function_name .., inlined_at 1 77 3`
fn place_of(line: &str, files: &BTreeMap<u32, String>) -> String {
    let at = |words: &str| -> Option<String> {
        let mut words = words.split_whitespace();
        let file = files.get(&words.next()?.parse().ok()?)?;
        Some(format!("{file}:{}", words.next()?))
    };
    let own = at(line.trim_start_matches(".loc")).unwrap_or_default();
    match line.split_once("inlined_at ").and_then(|(_, outer)| at(outer)) {
        Some(outer) => format!("{own} in {outer}"),
        None => own,
    }
}

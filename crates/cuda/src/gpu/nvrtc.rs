//! CUDA's run-time compiler: a source of `kernels/` to a cubin for one architecture. Needs no GPU.

use crate::{Error, HEADERS, Result, Source};
use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};
use std::ffi::{CStr, CString, c_char, c_int};
use std::ptr;

/// What a source compiles to.
#[derive(Clone, Debug)]
pub struct Compiled {
    /// The device's code.
    pub cubin: Vec<u8>,
    /// What the compiler says of registers, stack frames and spills.
    pub log: String,
}

/// The options of every compilation, but for the architecture.
///
/// Nothing is contracted or flushed behind the source's back, and division and roots round correctly (the default);
/// functions without a word are the device's.
const OPTIONS: [&str; 4] = ["-std=c++20", "--fmad=false", "-default-device", "--ptxas-options=-v"];

/// The compiler, found where the system looks for libraries.
#[derive(Clone, Copy, Debug)]
pub struct Nvrtc {
    /// Its version: major, minor.
    pub version: (i32, i32),
}

fn check(call: &'static str, result: nvrtcResult) -> Result<()> {
    if result == nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    // SAFETY: a constant string of the library for any result.
    let what = unsafe { CStr::from_ptr(sys::nvrtcGetErrorString(result)) };
    Err(Error::Device { call, what: what.to_string_lossy().into_owned() })
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("sources and options hold no NUL")
}

impl Nvrtc {
    /// Finds the library; without one, an error that says how to get it.
    pub fn load() -> Result<Self> {
        // SAFETY: looking for a library runs its initialisers, which NVIDIA's allow at any time.
        if !unsafe { sys::is_culib_present() } {
            let why = "NVRTC (libnvrtc), which compiles the kernels, is not where the system looks for libraries: \
                       install the CUDA toolkit, or the Python package nvidia-cuda-nvrtc and put its lib folder on \
                       LD_LIBRARY_PATH";
            return Err(Error::Missing(why.into()));
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the library is there; both point to integers.
        check("nvrtcVersion", unsafe { sys::nvrtcVersion(&mut major, &mut minor) })?;
        if major < 12 {
            let why = format!("NVRTC is of CUDA {major}.{minor}: expected 12.0 or later, which knows C++20");
            return Err(Error::Missing(why));
        }
        Ok(Self { version: (major, minor) })
    }

    /// The architectures that it compiles for, as 80 for sm_80.
    pub fn architectures(self) -> Result<Vec<i32>> {
        let mut count = 0;
        // SAFETY: an integer to write to.
        check("nvrtcGetNumSupportedArchs", unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) })?;
        let mut all = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: as many integers as the library has just said that it writes.
        check("nvrtcGetSupportedArchs", unsafe { sys::nvrtcGetSupportedArchs(all.as_mut_ptr()) })?;
        Ok(all)
    }

    /// Compiles a source for an architecture, such as "sm_90a".
    pub fn compile(self, source: &Source, architecture: &str) -> Result<Compiled> {
        let program = Program::new(source)?;
        let target = format!("-arch={architecture}");
        let options: Vec<CString> = OPTIONS.into_iter().chain([target.as_str()]).map(c_string).collect();
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        // SAFETY: a live program, and an array of as many strings as is said.
        let outcome = unsafe { sys::nvrtcCompileProgram(program.0, pointers.len() as c_int, pointers.as_ptr()) };
        let log = program.log()?;
        if outcome == nvrtcResult::NVRTC_ERROR_COMPILATION {
            return Err(Error::Compile { file: source.file.into(), log });
        }
        if outcome == nvrtcResult::NVRTC_ERROR_BUILTIN_OPERATION_FAILURE {
            let why =
                "NVRTC does not find its companion libnvrtc-builtins: it belongs beside libnvrtc, on LD_LIBRARY_PATH";
            return Err(Error::Missing(why.into()));
        }
        check("nvrtcCompileProgram", outcome)?;
        Ok(Compiled { cubin: program.cubin()?, log })
    }

    /// The registers of every kernel on each of [`ARCHITECTURES`], as a table.
    pub fn registers(self, sources: &[Source]) -> Result<String> {
        let mut table = format!("{:<32}", "registers a thread");
        ARCHITECTURES.iter().for_each(|name| table += &format!("{name:>8}"));
        table += "\n";
        for source in sources {
            let usage = ARCHITECTURES.map(|architecture| Ok(self.compile(source, architecture)?.usage()));
            let usage = usage.into_iter().collect::<Result<Vec<_>>>()?;
            for kernel in source.kernels {
                table += &format!("{kernel:<32}");
                for used in usage.iter().map(|all| all.iter().find(|used| used.kernel == *kernel)) {
                    table += &format!("{:>8}", used.map_or_else(|| "?".into(), |used| used.registers.to_string()));
                }
                table += "\n";
            }
        }
        Ok(table)
    }

    /// Everything that a source's cubin depends on, as one text.
    pub fn recipe(self, source: &Source, architecture: &str) -> String {
        let headers: String = HEADERS.iter().map(|(name, text)| format!("{name}\n{text}\n")).collect();
        format!("{:?} {architecture} {OPTIONS:?}\n{headers}{}", self.version, source.text)
    }
}

/// The architectures that every kernel compiles for and is measured on.
pub const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100"];

/// What a kernel takes of a multiprocessor, as the compiler's log says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The entry point.
    pub kernel: String,
    /// Registers a thread.
    pub registers: u32,
    /// Bytes of local memory: for a stack frame, and for registers that did not fit.
    pub local: u32,
}

impl Compiled {
    /// Every kernel's usage.
    pub fn usage(&self) -> Vec<Usage> {
        let (mut all, mut kernel, mut local) = (Vec::new(), None, 0);
        for line in self.log.lines() {
            // "Compiling entry function 'NAME' for 'sm_90a'"
            if let Some((_, rest)) = line.split_once("Compiling entry function '") {
                kernel = rest.split('\'').next().map(str::to_owned);
                local = 0;
            }
            // "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
            if line.contains("bytes stack frame") {
                let numbers = line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse::<u32>().ok());
                local = numbers.sum();
            }
            // "Used 24 registers, used 1 barriers, …"
            if let Some((_, rest)) = line.split_once("Used ") {
                let registers = rest.split(' ').next().and_then(|count| count.parse().ok());
                if let (Some(kernel), Some(registers)) = (kernel.take(), registers) {
                    all.push(Usage { kernel, registers, local });
                }
            }
        }
        all
    }
}

/// A program of the library, destroyed with its owner.
struct Program(nvrtcProgram);

impl Program {
    fn new(source: &Source) -> Result<Self> {
        let (text, name) = (c_string(source.text), c_string(&format!("{}.cu", source.file)));
        let headers: Vec<(CString, CString)> =
            HEADERS.iter().map(|(name, text)| (c_string(name), c_string(text))).collect();
        let texts: Vec<*const c_char> = headers.iter().map(|(_, text)| text.as_ptr()).collect();
        let names: Vec<*const c_char> = headers.iter().map(|(name, _)| name.as_ptr()).collect();
        let (mut program, count) = (ptr::null_mut(), headers.len() as c_int);
        // SAFETY: strings, and arrays of as many strings as is said; the library copies them.
        let outcome = unsafe {
            let (text, name) = (text.as_ptr(), name.as_ptr());
            sys::nvrtcCreateProgram(&mut program, text, name, count, texts.as_ptr(), names.as_ptr())
        };
        check("nvrtcCreateProgram", outcome)?;
        Ok(Self(program))
    }

    fn log(&self) -> Result<String> {
        let mut bytes = 0;
        // SAFETY: a live program and an integer to write to.
        check("nvrtcGetProgramLogSize", unsafe { sys::nvrtcGetProgramLogSize(self.0, &mut bytes) })?;
        let mut log = vec![0u8; bytes];
        // SAFETY: as many bytes as the library has just said that it writes.
        check("nvrtcGetProgramLog", unsafe { sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast()) })?;
        Ok(String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).into())
    }

    fn cubin(&self) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: a compiled program and an integer to write to.
        check("nvrtcGetCUBINSize", unsafe { sys::nvrtcGetCUBINSize(self.0, &mut bytes) })?;
        let mut cubin = vec![0u8; bytes];
        // SAFETY: as many bytes as the library has just said that it writes.
        check("nvrtcGetCUBIN", unsafe { sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast()) })?;
        Ok(cubin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: a live program, destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

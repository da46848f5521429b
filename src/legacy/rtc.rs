//! The CMOS clock and its memory (MC146818): 128 registers behind an index and a data port.
//!
//! Called on vCPU threads; Linux reads it a few times at boot. Time follows the host's UTC clock plus an offset, which
//! is what a guest changes when it sets the clock, so a set clock goes on through pause, save and restore. Times are
//! BCD and 24-hour, always. No update is ever in progress and nothing interrupts: a reader that wants a consistent
//! time reads the seconds twice, as Linux does. Registers:
//!
//! | index | |
//! |---|---|
//! | 0x00, 02, 04, 06–09, 32 | seconds, minutes, hours, day of week, day, month, year, century |
//! | 0x01, 03, 05 | alarm (kept, never raised) |
//! | 0x0A–0D | registers A, B, C, D |
//! | the rest | memory |

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::calendar::{CivilTime, SECONDS_MAX, SECONDS_MIN, TIME_REGISTER_COUNT};
use super::saved::{RTC_SCHEMA, RtcV1};
use crate::bus::BusDevice;
use crate::ids::UnitName;
use crate::unit::{PauseTicket, RestoreError, SaveError, Section, Unit};

/// The number of ports the clock answers.
pub const RTC_PORT_COUNT: u16 = 2;

/// The size of the memory behind registers A to D; the century's byte in it is never used.
pub(super) const NVRAM_BYTES: usize = 0x80 - NVRAM_START as usize;

const NVRAM_START: u8 = 0x0E;
const REGISTER_A: u8 = 0x0A;
const REGISTER_B: u8 = 0x0B;
const REGISTER_C: u8 = 0x0C;
const REGISTER_D: u8 = 0x0D;
/// The indices of the time registers, in the order of [`CivilTime::to_registers`].
const TIME_REGISTERS: [u8; TIME_REGISTER_COUNT] = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32];
const ALARM_REGISTERS: [u8; 3] = [0x01, 0x03, 0x05];
/// Register A at power-on: 32.768 kHz time base, 1.024 kHz rate.
const REGISTER_A_DEFAULT: u8 = 0x26;
/// Register A: an update is in progress. Never set.
const UIP: u8 = 1 << 7;
/// Register B: the guest is setting the time, which stands still meanwhile.
const SET: u8 = 1 << 7;
/// Register B: hours count from 0 to 23. Always set.
const HOURS_24: u8 = 1 << 1;
/// Register D: the contents are valid.
const VRT: u8 = 1 << 7;

/// The clock. Claim [`RTC_PORT_COUNT`] ports at `layout::RTC_PORT` for it.
pub struct Rtc {
    state: Mutex<RtcState>,
    utc_seconds: fn() -> i64,
}

/// All that the clock knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RtcState {
    pub(super) index: u8,
    pub(super) register_a: u8,
    /// What the guest's clock is ahead of the host's.
    pub(super) offset_seconds: i64,
    /// The time registers while the guest sets them (register B SET).
    pub(super) time_being_set: Option<[u8; TIME_REGISTER_COUNT]>,
    pub(super) alarm: [u8; 3],
    pub(super) nvram: [u8; NVRAM_BYTES],
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl Rtc {
    /// Makes a clock that shows the host's UTC time.
    pub fn new() -> Self {
        Self::with_clock(host_utc_seconds)
    }

    /// Makes a clock that follows `utc_seconds`, which counts from 1970-01-01T00:00:00Z.
    fn with_clock(utc_seconds: fn() -> i64) -> Self {
        Self {
            state: Mutex::new(RtcState {
                index: 0,
                register_a: REGISTER_A_DEFAULT,
                offset_seconds: 0,
                time_being_set: None,
                alarm: [0; 3],
                nvram: [0; NVRAM_BYTES],
            }),
            utc_seconds,
        }
    }

    fn lock(&self) -> MutexGuard<'_, RtcState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn host_utc_seconds() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(SECONDS_MAX),
        Err(before) => i64::try_from(before.duration().as_secs()).map_or(SECONDS_MIN, |seconds| -seconds),
    }
}

impl RtcState {
    /// The time registers now: those being set, or the running time.
    fn time(&self, utc_seconds: i64) -> [u8; TIME_REGISTER_COUNT] {
        let seconds = utc_seconds.saturating_add(self.offset_seconds);
        self.time_being_set
            .unwrap_or_else(|| CivilTime::from_seconds(seconds).to_registers())
    }

    fn read(&self, utc_seconds: i64) -> u8 {
        let index = self.index;
        if let Some(position) = position(&TIME_REGISTERS, index) {
            return self.time(utc_seconds)[position];
        }
        if let Some(position) = position(&ALARM_REGISTERS, index) {
            return self.alarm[position];
        }
        match index {
            REGISTER_A => self.register_a,
            REGISTER_B if self.time_being_set.is_some() => SET | HOURS_24,
            REGISTER_B => HOURS_24,
            REGISTER_C => 0,
            REGISTER_D => VRT,
            _ => self.nvram[usize::from(index - NVRAM_START)],
        }
    }

    fn write(&mut self, value: u8, utc_seconds: i64) {
        let index = self.index;
        if let Some(position) = position(&TIME_REGISTERS, index) {
            let mut registers = self.time(utc_seconds);
            registers[position] = value;
            match &mut self.time_being_set {
                Some(being_set) => *being_set = registers,
                None => self.set_time(registers, utc_seconds),
            }
            return;
        }
        if let Some(position) = position(&ALARM_REGISTERS, index) {
            self.alarm[position] = value;
            return;
        }
        match index {
            REGISTER_A => self.register_a = value & !UIP,
            REGISTER_B if value & SET != 0 => self.time_being_set = Some(self.time(utc_seconds)),
            REGISTER_B => {
                if let Some(registers) = self.time_being_set.take() {
                    self.set_time(registers, utc_seconds);
                }
            }
            REGISTER_C | REGISTER_D => {}
            _ => self.nvram[usize::from(index - NVRAM_START)] = value,
        }
    }

    /// Lets the clock go on from `registers`; a time that does not exist changes nothing.
    fn set_time(&mut self, registers: [u8; TIME_REGISTER_COUNT], utc_seconds: i64) {
        if let Some(time) = CivilTime::from_registers(registers) {
            self.offset_seconds = time.to_seconds().saturating_sub(utc_seconds);
        }
    }
}

fn position(registers: &[u8], index: u8) -> Option<usize> {
    registers.iter().position(|register| *register == index)
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The index port is write-only.
        if let ([byte], 1) = (data, offset) {
            *byte = self.lock().read((self.utc_seconds)());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (data, offset) {
            // Bit 7 masks the non-maskable interrupt of a PC and is no part of the index.
            ([byte], 0) => self.lock().index = *byte & 0x7F,
            ([byte], 1) => self.lock().write(*byte, (self.utc_seconds)()),
            _ => {}
        }
    }
}

impl Unit for Rtc {
    fn name(&self) -> UnitName {
        UnitName::new("rtc").expect("a short name without control characters")
    }

    /// The clock and its memory run on a battery: a reset ends a setting of the time and changes nothing else.
    fn reset(&self) {
        let mut state = self.lock();
        state.index = 0;
        state.time_being_set = None;
    }

    fn pause(&self, ticket: PauseTicket) {
        drop(ticket);
    }

    fn resume(&self) {}

    fn save(&self) -> Result<Section, SaveError> {
        Section::encode(RTC_SCHEMA, &RtcV1::from(self.lock().clone()))
    }

    fn restore(&self, section: &Section) -> Result<(), RestoreError> {
        let state = RtcState::try_from(section.decode::<RtcV1>(RTC_SCHEMA)?)?;
        *self.lock() = state;
        Ok(())
    }

    fn inspect(&self) -> Value {
        let state = self.lock();
        json!({
            "offset_seconds": state.offset_seconds,
            "being_set": state.time_being_set.is_some(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// 2024-02-29T23:59:58Z, a Thursday.
    const LEAP_DAY: i64 = 1_709_251_198;

    thread_local! {
        static NOW: Cell<i64> = const { Cell::new(LEAP_DAY) };
    }

    fn rtc() -> Rtc {
        NOW.set(LEAP_DAY);
        Rtc::with_clock(|| NOW.get())
    }

    fn get(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut data = [0xFF];
        rtc.read(1, &mut data);
        data[0]
    }

    fn set(rtc: &Rtc, index: u8, value: u8) {
        rtc.write(0, &[index]);
        rtc.write(1, &[value]);
    }

    fn time(rtc: &Rtc) -> [u8; TIME_REGISTER_COUNT] {
        TIME_REGISTERS.map(|index| get(rtc, index))
    }

    #[test]
    fn shows_host_time_in_bcd() {
        let rtc = rtc();
        assert_eq!(time(&rtc), [0x58, 0x59, 0x23, 0x05, 0x29, 0x02, 0x24, 0x20]);
        NOW.set(LEAP_DAY + 2);
        assert_eq!(time(&rtc), [0x00, 0x00, 0x00, 0x06, 0x01, 0x03, 0x24, 0x20]);
        // Bit 7 of the index is not the clock's.
        assert_eq!(get(&rtc, 0x80 | 0x08), 0x03);
    }

    #[test]
    fn is_never_updating_and_always_valid() {
        let rtc = rtc();
        for index in 0..=0xFF {
            set(&rtc, index, 0xFF);
        }
        set(&rtc, REGISTER_B, 0);
        assert_eq!(get(&rtc, REGISTER_A) & UIP, 0);
        assert_eq!(get(&rtc, REGISTER_B), HOURS_24);
        assert_eq!(get(&rtc, REGISTER_C), 0);
        assert_eq!(get(&rtc, REGISTER_D), VRT);
        // 0xFF in every time register is no time: the clock went on.
        assert_eq!(get(&rtc, 0x09), 0x24);
    }

    #[test]
    fn a_time_set_by_the_guest_goes_on_and_survives_saving() {
        let before = rtc();
        set(&before, REGISTER_B, SET);
        let new = [0x30, 0x15, 0x06, 0x01, 0x31, 0x12, 0x99, 0x19];
        for (index, value) in TIME_REGISTERS.into_iter().zip(new) {
            set(&before, index, value);
        }
        NOW.set(LEAP_DAY + 100);
        assert_eq!(time(&before), new);
        let section = before.save().expect("the state encodes");
        let after = rtc();
        after.restore(&section).expect("the state was just saved");
        NOW.set(LEAP_DAY + 200);
        set(&after, REGISTER_B, 0);
        NOW.set(LEAP_DAY + 231);
        // Thirty-one seconds later; the day of the week follows from the date.
        assert_eq!(time(&after), [0x01, 0x16, 0x06, 0x06, 0x31, 0x12, 0x99, 0x19]);
    }

    #[test]
    fn memory_and_alarm_are_kept_through_reset_and_saving() {
        let before = rtc();
        set(&before, 0x0E, 1);
        set(&before, 0x7F, 2);
        set(&before, 0x05, 3);
        before.reset();
        let after = rtc();
        after
            .restore(&before.save().expect("the state encodes"))
            .expect("the state was just saved");
        assert_eq!([0x0E, 0x7F, 0x05].map(|index| get(&after, index)), [1, 2, 3]);
    }

    #[test]
    fn impossible_saved_values_are_refused_by_name() {
        let rtc = rtc();
        let good = rtc.save().expect("the state encodes");
        let cases = [
            (
                "index",
                json!(0x80),
                "saved index is 0x80: the clock has 128 registers",
            ),
            (
                "register_a",
                json!(0xA6),
                "saved register_a is 0xa6: bit 7 is read-only",
            ),
            ("nvram", json!([1, 2]), "saved nvram is 2 bytes: expected 114"),
            (
                "time_being_set",
                json!([0]),
                "saved time_being_set is 1 bytes: expected 0 or 8",
            ),
        ];
        for (field, value, message) in cases {
            let mut section = good.clone();
            section.body[field] = value;
            let error = rtc.restore(&section).expect_err("the value is impossible");
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn an_extreme_offset_shows_the_last_year_and_never_overflows() {
        let rtc = rtc();
        let mut section = rtc.save().expect("the state encodes");
        for (offset, year) in [(i64::MAX, [0x99, 0x99]), (i64::MIN, [0x00, 0x00])] {
            section.body["offset_seconds"] = json!(offset);
            rtc.restore(&section).expect("any offset is possible");
            assert_eq!([get(&rtc, 0x09), get(&rtc, 0x32)], year);
            set(&rtc, 0x00, 0x01);
        }
    }
}

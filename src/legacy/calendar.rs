//! The calendar of the CMOS clock: between seconds since 1970 and what its registers show.
//!
//! Pure arithmetic over the proleptic Gregorian calendar, years 0 to 9999. Register values are the guest's.

/// The number of registers that hold a time.
pub(super) const TIME_REGISTER_COUNT: usize = 8;

const DAY_SECONDS: i64 = 86_400;
/// 1970-01-01 counted in days from 0000-03-01 of the proleptic Gregorian calendar.
const EPOCH_DAYS: i64 = 719_468;
/// 400 years.
const ERA_DAYS: i64 = 146_097;
/// 0000-01-01T00:00:00Z.
pub(super) const SECONDS_MIN: i64 = -(60 + EPOCH_DAYS) * DAY_SECONDS;
/// 9999-12-31T23:59:59Z.
pub(super) const SECONDS_MAX: i64 = 253_402_300_799;

/// A moment in UTC as a calendar shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CivilTime {
    /// 0–9999.
    year: i64,
    /// 1–12.
    month: i64,
    /// 1–31.
    day: i64,
    /// 1–7, Sunday is 1.
    weekday: i64,
    second_of_day: i64,
}

impl CivilTime {
    /// The moment `seconds` after 1970-01-01T00:00:00Z, limited to the years 0 to 9999.
    pub(super) fn from_seconds(seconds: i64) -> Self {
        let seconds = seconds.clamp(SECONDS_MIN, SECONDS_MAX);
        let days = seconds.div_euclid(DAY_SECONDS);
        // Years that begin in March have their leap day at the end, so that months before it never move.
        let since_march = days + EPOCH_DAYS;
        let day_of_era = since_march.rem_euclid(ERA_DAYS);
        let leap_days = day_of_era / 1460 - day_of_era / 36_524 + day_of_era / 146_096;
        let year_of_era = (day_of_era - leap_days) / 365;
        let day_of_year = day_of_era - days_before_year(year_of_era);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let month = (month_from_march + 2) % 12 + 1;
        let year = since_march.div_euclid(ERA_DAYS) * 400 + year_of_era + i64::from(month <= 2);
        Self {
            year,
            month,
            day: day_of_year - days_before_month(month_from_march) + 1,
            // 1970-01-01 was a Thursday.
            weekday: (days + 4).rem_euclid(7) + 1,
            second_of_day: seconds.rem_euclid(DAY_SECONDS),
        }
    }

    pub(super) fn to_seconds(self) -> i64 {
        let month_from_march = (self.month + 9) % 12;
        let year = self.year - i64::from(self.month <= 2);
        let day_of_era =
            days_before_year(year.rem_euclid(400)) + days_before_month(month_from_march) + self.day - 1;
        let days = year.div_euclid(400) * ERA_DAYS + day_of_era - EPOCH_DAYS;
        days * DAY_SECONDS + self.second_of_day
    }

    pub(super) fn to_registers(self) -> [u8; TIME_REGISTER_COUNT] {
        [
            self.second_of_day % 60,
            self.second_of_day / 60 % 60,
            self.second_of_day / 3600,
            self.weekday,
            self.day,
            self.month,
            self.year % 100,
            self.year / 100,
        ]
        .map(to_bcd)
    }

    /// What the registers say, whatever their day of the week; `None` when there is no such time.
    pub(super) fn from_registers(registers: [u8; TIME_REGISTER_COUNT]) -> Option<Self> {
        let mut values = [0; TIME_REGISTER_COUNT];
        for (value, register) in values.iter_mut().zip(registers) {
            *value = from_bcd(register)?;
        }
        let [second, minute, hour, _, day, month, year, century] = values;
        if second > 59 || minute > 59 || hour > 23 || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
            return None;
        }
        let time = Self {
            year: century * 100 + year,
            month,
            day,
            weekday: 0,
            second_of_day: (hour * 60 + minute) * 60 + second,
        };
        // A day that the month does not have comes back as another one.
        let seen = Self::from_seconds(time.to_seconds());
        (seen.day == day && seen.month == month).then_some(seen)
    }
}

/// The days of the years, begun in March, before year `year` of an era.
fn days_before_year(year: i64) -> i64 {
    year * 365 + year / 4 - year / 100
}

/// The days of the months before month `month`, counted from March as 0.
fn days_before_month(month: i64) -> i64 {
    (153 * month + 2) / 5
}

fn to_bcd(value: i64) -> u8 {
    ((value / 10 * 16) + value % 10) as u8
}

fn from_bcd(value: u8) -> Option<i64> {
    let (tens, ones) = (value >> 4, value & 0xF);
    (tens < 10 && ones < 10).then(|| i64::from(tens * 10 + ones))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_day_of_ten_thousand_years_is_right() {
        let leap = |year: i64| year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let mut seconds = SECONDS_MIN;
        // 0000-01-01 was a Saturday.
        let mut weekday = 7;
        for year in 0..=9999 {
            let february = if leap(year) { 29 } else { 28 };
            let months = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
            for (month, days) in (1..).zip(months) {
                for day in 1..=days {
                    let expected = CivilTime {
                        year,
                        month,
                        day,
                        weekday,
                        second_of_day: 0,
                    };
                    assert_eq!(CivilTime::from_seconds(seconds), expected);
                    assert_eq!(expected.to_seconds(), seconds);
                    seconds += DAY_SECONDS;
                    weekday = weekday % 7 + 1;
                }
            }
        }
        assert_eq!(seconds, SECONDS_MAX + 1);
    }
}
